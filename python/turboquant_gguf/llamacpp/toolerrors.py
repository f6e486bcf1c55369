"""Says in a sentence why a llama.cpp tool failed, from its log."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from pathlib import Path

from ..errors import TurboquantError

# What a log says, and what the user can do ({0}, {1}: the groups). The first pattern that matches decides.
_ADVICE = (
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


def advice(log: str) -> str | None:
    """What the user can do about the first error in `log` that is known here, in a sentence or two."""
    found = ((re.search(pattern, log), text) for pattern, text in _ADVICE)
    return next((text.format(*match.groups()) for match, text in found if match), None)


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
