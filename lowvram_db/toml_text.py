"""TOML as people's editors and shells save it, and what is wrong with it in words that say how to mend it."""

import re
import tomllib
from pathlib import Path
from typing import Any

from lowvram_db.errors import UserError

_LARGEST = 2**20  # bytes; a run's settings take a hundredth
# Byte order marks, the longer ones first: that of UTF-32 begins as that of UTF-16 does.
_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_PLACE = re.compile(r"\(at line (\d+), column \d+\)")
_CURLY = re.compile("[“”„‟‘’‚«»]")
BACKSLASHES = "in \"double quotes\" a backslash begins an escape; write the path with / or in 'single quotes'"


def read(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with its mark. Raises UserError for anything else."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; `lowvram-db new` writes one") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give the TOML file in it") from error
        raise UserError(f"{path}: cannot be read ({error})") from error
    if len(content) > _LARGEST:
        raise UserError(f"{path}: is too large to be a run's settings; give the TOML file of the run")
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: cannot be read: line {line} is not in UTF-8; save it as UTF-8 text") from error
    if "\0" in text:
        raise UserError(f"{path}: cannot be read: has zero bytes in it; save it as UTF-8 text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse(text: str, path: Path) -> dict[str, Any]:
    """The tree of the text that stands in `path`. Raises UserError naming the line and the mend."""
    try:
        text.encode()
        return tomllib.loads(text + "\n")  # so that what is wrong in the last line is in a line
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: {text[error.start : error.end]!r} is no character; leave it out") from error
    except RecursionError as error:
        raise UserError(f"{path}: not valid TOML: brackets are nested too deeply") from error
    except ValueError as error:  # also for numbers of more digits than Python reads
        raise UserError(f"{path}: not valid TOML: {_mend(text, str(error))}") from error


def _mend(text: str, said: str) -> str:
    """What the parser said of the text, with the mend where the cause can be told from the line."""
    place = _PLACE.search(said)
    if not place:
        return said
    number = int(place[1])
    line = text.split("\n")[number - 1]
    if '"' in line and "\\" in line:
        return f"line {number}: {BACKSLASHES}"
    if _CURLY.search(line):
        return f"line {number}: has curly quotes; write straight ones"
    if "overwrite" in said or "twice" in said:
        return f"line {number}: sets again what stands further up; keep one of them"
    if "Invalid value" in said:
        return f'line {number}: {line.strip()[:80]}: text stands in "quotes", true and false are written small'
    return said
