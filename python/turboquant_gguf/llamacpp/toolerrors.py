"""What the user can do about a tool that failed, in a sentence, from what the tool logged."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from pathlib import Path

from ..errors import TurboquantError

Advice = tuple[tuple[str, str], ...]
"""What a log says (a regular expression), and what the user can do; {0} and {1} are its groups, other names are facts
that the caller knows. The first pattern that matches decides."""

LLAMA_CPP: Advice = (
    (
        r"head size of (\d+)\. Cache types that work for it: (.*)",
        "This model's heads hold {0} values, which are not whole blocks of the cache type. Types that work: {1}.",
    ),
    (
        r"block size (\d+) does not divide n_embd_head_\w=(\d+)",
        "This model's heads hold {1} values, which are not whole blocks of {0}. Choose another cache type.",
    ),
    (
        r"does not support different K .* and V",
        "This model keeps keys and values as one, so they must have the same cache type.",
    ),
    (r"couldn't bind", "Its port is taken. Choose another with --port, or none for a free one."),
    (
        r"failed to allocate|unable to allocate|out of memory|bad_alloc",
        "There is not enough memory. Choose a shorter context or a smaller cache type.",
    ),
    (
        r"not within the file bounds|corrupted|invalid magic|failed to read|gguf_init|unexpectedly reached end",
        "The model file is damaged or incomplete. Download it again.",
    ),
    (
        r"GGML_ASSERT|terminate called|unordered_map::at",
        "The model file is probably damaged: download or convert it again.",
    ),
    (r"unknown model architecture", "The llama.cpp in this package is older than the model's architecture."),
)
GGUF: Advice = (
    (r"GGUFv1", "is a GGUF of version 1, which llama.cpp has given up. Convert the model again."),
    (r"only supports up to version", "is a GGUF of a version newer than the llama.cpp in this package."),
    (r"endianness", "is a GGUF for machines of the other byte order. Convert it with gguf-convert-endian."),
    (
        r"(tensor '.*') has invalid ggml type",
        "has a {0} of a type unknown here. It is newer than the llama.cpp in this package, or damaged.",
    ),
)
"""What ggml logs where it refuses a file; the sentences begin with the name of the file."""

PIP: Advice = (
    (
        r"No module named '?(?:pip|ensurepip)|ensurepip is disabled",
        "This Python ({python}) has neither pip, which fetches {title}, nor ensurepip, which brings pip. Install one: "
        "apt-get install python3-venv (Debian, Ubuntu), or uv pip install pip (in an environment of uv's).",
    ),
    (
        r"DO NOT MATCH THE HASHES",
        "The download of {title} arrived damaged or altered (its hash is wrong) and was thrown away. Try again; if "
        "it stays so, a proxy or package mirror serves another file.",
    ),
    (r"No space left on device", "The disk filled up while fetching {title}. Free some space."),
)
PIP_NETWORK: Advice = (
    (
        r"NewConnectionError|Connection refused|Name or service|name resolution|Network is unreachable"
        r"|[Tt]imed? ?out|ProxyError|Could not fetch URL|Failed to establish|SSLError|from versions: none",
        "The package index that serves {title} cannot be reached. Check the network or pip's proxy settings, or "
        "use a model of your own: --model my.gguf",
    ),
)

_TAIL_LINES = 8


def check_model_file(path: Path) -> None:
    """Raise TurboquantError unless `path` is a file that begins like a GGUF."""
    if path.is_dir():
        raise TurboquantError(f"There is no model file {path}: it is a folder. Give the path of a GGUF file.")
    if not path.is_file():
        raise TurboquantError(f"There is no model file {path}. Give the path of a GGUF file.")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise TurboquantError(f"The model file {path} cannot be read: {error.strerror}.") from error
    if magic != b"GGUF":
        raise TurboquantError(
            f"{path} is not a GGUF file (it begins with {magic!r}, not b'GGUF'). Convert the model to GGUF or "
            "download it again."
        )


def tool_error(tool: str, returncode: int | None, log: str) -> TurboquantError:
    """The error of a tool that ended with `returncode` (None: it runs but does not answer) and wrote `log`."""
    return TurboquantError(
        f"{tool} {_ending(returncode)}. {advice(log) or 'The end of its log follows.'}", _end_of(log)
    )


def crash(files: Sequence[str], number: signal.Signals, log: str) -> TurboquantError:
    """The error of a command that was ended by signal `number` while it used these model files. log: what C printed."""
    if number == signal.SIGKILL:
        return TurboquantError("The command was ended by SIGKILL, maybe for want of memory.", _end_of(log))
    what = advice(log) or advice("GGML_ASSERT")
    return TurboquantError(
        f"llama.cpp gave up on {' or '.join(files) or 'the model'} ({number.name}). {what}", _end_of(log)
    )


def advice(log: str, table: Advice = LLAMA_CPP, **facts: str) -> str | None:
    """What the user can do about the first error of `table` that is in `log`, in a sentence or two; None without one.

    facts: what the sentences name besides what the log says.
    """
    found = ((re.search(pattern, log), text) for pattern, text in table)
    return next((text.format(*match.groups(), **facts) for match, text in found if match), None)


def cause(log: str) -> str:
    """What the first line of a log of C code says, without the name of the function that it begins with."""
    return log.partition("\n")[0].partition(": ")[2]


def _end_of(log: str) -> str:
    """The last errors that the log names, each once; without one, its last lines."""
    lines = log.strip().splitlines()
    errors = dict.fromkeys(line.partition(" E ")[2] for line in lines if " E " in line)
    errors = errors or dict.fromkeys(line for line in lines if re.search(r"\b(error|failed)\b", line))
    return "\n".join((list(errors) or lines)[-_TAIL_LINES:])


def _ending(returncode: int | None) -> str:
    if returncode is None:
        return "does not answer"
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"stopped with exit code {returncode}"
