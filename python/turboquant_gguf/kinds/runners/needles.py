"""Prompts that hide a needle (a sentence with a number) in a haystack (a long text), and ask for the number."""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ...errors import TurboquantError

FULL = 0.97
"""What share of its length a prompt is filled to, if any sentence fits."""

LEAST = 0.9
"""A text of which prompts are not even that full is refused."""

_CITIES = (
    "Athens", "Baghdad", "Berlin", "Bogota", "Boston", "Brussels", "Cairo", "Caracas", "Chicago", "Damascus", "Delhi",
    "Denver", "Dublin", "Geneva", "Hamburg", "Havana", "Helsinki", "Istanbul", "Jakarta", "Kyoto", "Lima", "Lisbon",
    "London", "Madrid", "Manila", "Melbourne", "Miami", "Montreal", "Moscow", "Nairobi", "Oslo", "Paris", "Prague",
    "Quito", "Rome", "Santiago", "Seoul", "Stockholm", "Sydney", "Tokyo", "Toronto", "Tunis", "Venice", "Vienna",
    "Warsaw", "Zurich",
)  # fmt: skip

# Slots of the generated sentences. Neither they nor the templates name a city or hold a digit.
_WORDS = {
    "who": (
        "baker", "carpenter", "doctor", "farmer", "fisherman", "gardener", "librarian", "mason", "miller", "neighbour",
        "painter", "postman", "schoolteacher", "shepherd", "tailor", "watchmaker",
    ),
    "adjective": (
        "careful", "cheerful", "curious", "gentle", "impatient", "old", "patient", "proud", "quiet", "stubborn",
        "tall", "tired", "wise", "young",
    ),
    "did": (
        "borrowed", "carried", "cleaned", "described", "drew", "found", "forgot", "hid", "mended", "painted", "praised",
        "sold", "studied", "wrapped",
    ),
    "thing": (
        "basket of apples", "blue umbrella", "broken clock", "bundle of letters", "copper kettle", "garden gate",
        "heavy ladder", "jar of honey", "leather saddle", "map of the valley", "pair of boots", "silver spoon",
        "stack of firewood", "wooden chair", "wool blanket",
    ),
    "place": (
        "at the edge of the forest", "behind the mill", "beside the river", "beyond the orchard", "by the harbour",
        "in the market square", "in the narrow lane", "near the chapel", "next to the stable", "on the hill",
        "outside the schoolhouse", "under the stone bridge",
    ),
    "when": (
        "After breakfast", "All through the summer", "At dusk", "Before the rain came", "Early in the morning",
        "Late in the evening", "Long ago", "On the first warm day", "One quiet afternoon", "Shortly before noon",
        "Toward the end of winter", "When the bells rang",
    ),
    "why": (
        "because nobody else would", "because the weather had changed", "for no particular reason",
        "in order to please the children", "so that the work could go on", "to settle an old argument",
        "while the others were asleep", "without saying a word",
    ),
    "weather": (
        "A light wind moved the leaves", "Clouds gathered slowly", "Snow covered the fields", "The air smelled of hay",
        "The rain had stopped at last", "The sun stood low", "There was mist over the meadows",
    ),
}  # fmt: skip
_TEMPLATES = (
    "The {adjective} {who} {did} the {thing} {place}.",
    "{when}, the {who} {did} a {thing} {why}.",
    "{weather}, and the {who} waited {place}.",
    "Nobody knew why the {adjective} {who} had left the {thing} {place}.",
    "{when}, a {adjective} {who} met the {who} {place}, and they talked about the {thing}.",
    "The {who} {did} the {thing} {why}.",
    "{weather}.",
    "It was the {who} who {did} the {thing} that stood {place}.",
    "People said that the {who} was {adjective}, but the {who} never believed it.",
    "{when}, everyone gathered {place} to see the {thing}.",
)


@dataclass(frozen=True)
class Needle:
    """What is hidden, and what is asked of it. number: digits."""

    city: str
    number: str

    @classmethod
    def draw(cls, rng: random.Random) -> Needle:
        """A needle of a random city and a random number of five digits."""
        return cls(rng.choice(_CITIES), str(rng.randrange(10_000, 100_000)))

    @property
    def sentence(self) -> str:
        """The needle itself."""
        return f"The magic number of {self.city} is {self.number}."

    @property
    def question(self) -> str:
        """What the prompt ends with."""
        return f"What is the magic number of {self.city}? Answer with the number only."

    def is_in(self, answer: str) -> bool:
        """Whether the number is in `answer`, and not as a part of a longer one."""
        return re.search(rf"(?<!\d){self.number}(?!\d)", answer) is not None


def generated(seed: int) -> Iterator[str]:
    """Sentences without end, always the same for a `seed`, and never the same one twice in a row."""
    rng = random.Random(seed)
    previous = ""
    while True:
        sentence = re.sub(r"\{(\w+)\}", lambda slot: rng.choice(_WORDS[slot[1]]), rng.choice(_TEMPLATES))
        if sentence != previous:
            yield sentence
        previous = sentence


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, each on one line."""
    pieces = re.split(r"(?<=[.!?])\s+|(?<=[。！？])", text)
    return [sentence for piece in pieces if (sentence := " ".join(piece.split()))]


def prompt(sentences: Sequence[str], needle: Needle, depth: float) -> str:
    """The sentences with the needle among them, and the question.

    depth: where the needle lies, as a percentage of the text (0: first, 100: last), at the nearest end of a sentence.
    """
    ends = [0, *accumulate(map(len, sentences))]
    place = min(range(len(ends)), key=lambda index: abs(ends[index] - ends[-1] * depth / 100))
    text = " ".join([*sentences[:place], needle.sentence, *sentences[place:]])
    return f"{text}\n\n{needle.question}"


def fill(
    sentences: Sequence[str], needle: Needle, depth: float, length: int, count: Callable[[str], int]
) -> tuple[str, int]:
    """The prompt of as many sentences as `length` tokens hold, and its tokens. count: tokens of a prompt.

    Sentences are taken in order. What room they leave is filled with shorter ones from further on, until the prompt is
    FULL. Raises TurboquantError if not even LEAST of it can be filled.
    """
    sentences = sentences[:length]  # each takes a token at least

    def size(kept: int) -> int:
        return count(prompt(sentences[:kept], needle, depth))

    kept = bisect_right(range(len(sentences) + 1), length, key=size) - 1
    if kept < 0:
        raise TurboquantError(f"A prompt of {length} tokens is too short: the question alone takes {size(0)}.")
    chosen = list(sentences[:kept])
    text = prompt(chosen, needle, depth)
    tokens = count(text)
    for sentence in sentences[kept + 1 :]:
        if tokens >= FULL * length:
            break
        longer = prompt([*chosen, sentence], needle, depth)
        if (more := count(longer)) <= length:
            chosen.append(sentence)
            text, tokens = longer, more
    if tokens < LEAST * length:
        raise TurboquantError(
            f"The text fills only {tokens} of the {length} tokens that a prompt is to have. Give a longer text, or one "
            "of shorter sentences."
        )
    return text, tokens
