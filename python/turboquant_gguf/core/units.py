"""Units of size, and large numbers as people read them."""

import re

GB = 1e9
MIB = 1 << 20

UNITS = {
    **{unit: 1024**power for power, unit in enumerate(("B", "KiB", "MiB", "GiB", "TiB"))},
    **{unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))},
}


def size_text(count: int) -> str:
    """Bytes in the largest unit that leaves a number above 1, such as "8 GiB" or "92.09 MiB"."""
    unit = next(unit for unit in ("TiB", "GiB", "MiB", "KiB", "B") if count >= UNITS[unit] or unit == "B")
    return f"{count / UNITS[unit]:.4g} {unit}"


def count_text(count: int) -> str:
    """A large number, such as "134.5 M" or "7.242 B"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return str(count)


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "500 MB", "1.5TiB" or "8589934592". Raises ValueError with a sentence."""
    written = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]*)", text.strip(), re.IGNORECASE | re.ASCII)
    unit = written and {name.lower(): size for name, size in UNITS.items()}.get(written[2].lower() or "b")
    if not unit or not float(written[1]):
        raise ValueError(f"{text!r} is not a size of memory. Write it like 8GiB, 500MB or 8589934592.")
    size = int(float(written[1]) * unit)
    if not written[2] and size < UNITS["KiB"]:
        raise ValueError(f"{text!r} would be bytes, in which nothing fits. Write it like 8GiB, 500MB or 8589934592.")
    return size
