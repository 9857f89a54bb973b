"""Amounts of memory as people write them: "12GiB", "4608 MiB", "11.5 GB"."""

import re

_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([kmg]i?b)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes. Raises ValueError, in words for the user, for what is no size above zero."""
    match = _SIZE.fullmatch(text)
    if not match or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, for example 12GiB or 4608MiB")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
