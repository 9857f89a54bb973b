"""Amounts of memory as people write them: "12GiB", "4608 MiB", "11.5 GB", "11,5 GB", "12G"."""

import re

_UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"K": 2**10, "M": 2**20, "G": 2**30}  # as Linux, Docker and Slurm mean them
# Three digits behind a comma can be thousands as well.
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{0,15}|,\d{1,2})?)\s*([kmg](?:i?b)?)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes. Raises ValueError, in words for the user, for what is no size above zero."""
    match = _SIZE.fullmatch(text)
    number = float(match[1].replace(",", ".")) if match else 0.0
    if not match or number == 0:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, for example 12GiB or 4608MiB")
    return round(number * _UNITS[match[2].upper()])


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
