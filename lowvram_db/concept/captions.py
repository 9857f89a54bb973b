"""What people and other programs write about pictures beside them, in the files and encodings that they have.

`photo.txt` or `photo.caption` beside `photo.jpg`, a caption a line; or one `captions.jsonl` or `metadata.jsonl` for the
folder, as data sets have it, a line a picture:

    {"file_name": "photo.jpg", "text": "a {identifier} {class} in snow", "crop": [120, 40, 980, 900]}

"text" may be a list, of which each step draws one. "crop" is left, top, right and bottom of what is to be seen of an
upright picture, in pixels.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from lowvram_db.errors import UserError
from lowvram_db.progress import say

Box = tuple[float, float, float, float]

SUFFIXES = (".txt", ".caption")
LISTS = ("captions.jsonl", "metadata.jsonl")
_MOST_BYTES = 2**16  # of one picture's captions; a prompt has 77 tokens
_MOST_LIST_BYTES = 2**26
_FILE_KEYS = ("file_name", "file", "image", "path")
_TEXT_KEYS = ("text", "caption", "captions", "prompt")
_EMPHASIS = re.compile(r"(?<!\\)\(([^()]*?):\d+(\.\d+)?\)")  # A1111's (word:1.2)
_NETWORK = re.compile(r"<(lora|lyco|hypernet):[^<>]*>")
_MOST_NAMES = 3
_say_once = cache(say)  # a folder is looked at several times in a run


@dataclass
class Sidecar:
    """What stands beside one picture."""

    file: Path  # where it stands
    captions: list[str] = field(default_factory=list)  # as they were written, but for spaces
    crop: Box | None = None


def read_sidecars(folder: Path, photos: Sequence[Path]) -> dict[Path, Sidecar]:
    """Of the photos of one folder that have one; a file of a photo's own goes before a list. What belongs to no photo
    is said once. Raises UserError naming a file that is no text, or what is wrong in a list."""
    by_name = {photo.name: photo for photo in photos}
    found: dict[Path, Sidecar] = {}
    lost: list[str] = []
    for listed in (folder / name for name in reversed(LISTS)):
        for name, sidecar in _of_list(listed) if listed.is_file() else ():
            if photo := by_name.get(name):
                found[photo] = sidecar
            else:
                lost.append(f"{name} in {listed.name}")
    own = {file.name: file for file in sorted(folder.iterdir()) if _is_caption(file)}
    for photo in photos:
        names = [name for suffix in SUFFIXES for name in (photo.stem + suffix, photo.name + suffix) if name in own]
        for name in reversed(names):
            found.setdefault(photo, Sidecar(own[name])).captions = _of_file(own[name])
            found[photo].file = own[name]
    used = {name for photo in photos for suffix in SUFFIXES for name in (photo.stem + suffix, photo.name + suffix)}
    if lost := [*(name for name in own if name not in used), *lost]:
        listed_ = ", ".join(lost[:_MOST_NAMES]) + (", ..." if len(lost) > _MOST_NAMES else "")
        _say_once(f"{folder.absolute()}: {len(lost)} captions belong to no picture there ({listed_})")
    return found


def filled(caption: str, identifier: str, class_noun: str) -> str:
    """A caption with the subject's name in it: where it says {identifier} or the word itself, else before the class
    noun, else in front."""
    named = caption.replace("{class}", class_noun)
    if "{identifier}" in named:
        return named.replace("{identifier}", identifier)
    if _word(identifier).search(named):
        return named
    noun = _word(class_noun).search(named)
    if noun is None:
        return f"{identifier} {class_noun}, {named}"
    return f"{named[: noun.start()]}{identifier} {named[noun.start() :]}"


def names_subject(caption: str, identifier: str) -> bool:
    return "{identifier}" in caption or bool(_word(identifier).search(caption))


def _word(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)


def _is_caption(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _of_file(file: Path) -> list[str]:
    captions = [tidy for line in _text(file, _MOST_BYTES).splitlines() if (tidy := _tidied(line))]
    if not captions:
        _say_once(f"{file}: is empty; its picture is shown under subject.prompts")
    return captions


def _tidied(caption: str) -> str:
    """Spaces and commas put in order, and without what only A1111's own prompts mean by brackets."""
    plain = _EMPHASIS.sub(r"\1", _NETWORK.sub("", caption)).replace(r"\(", "(").replace(r"\)", ")")
    return ", ".join(part for tag in plain.split(",") if (part := " ".join(tag.split())))


def _of_list(file: Path) -> Iterator[tuple[str, Sidecar]]:
    for number, line in enumerate(_text(file, _MOST_LIST_BYTES).splitlines(), 1):
        if line.strip():
            try:
                yield _of_line(json.loads(line), file)
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                what = " ".join(str(error).split())
                raise UserError(f"{file}: line {number}: {what}; mend the line, or remove it") from error


def _of_line(entry: Any, file: Path) -> tuple[str, Sidecar]:
    """Raises ValueError for what says nothing of a picture."""
    if not isinstance(entry, dict):
        raise ValueError('is no object, such as {"file_name": "photo.jpg", "text": "..."}')
    name = next((entry[key] for key in _FILE_KEYS if key in entry), None)
    text: Any = next((entry[key] for key in _TEXT_KEYS if key in entry), [])
    captions = [text] if isinstance(text, str) else text
    if not isinstance(name, str) or not name:
        raise ValueError(f"names no picture; it wants a {_FILE_KEYS[0]}")
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("its text should be a caption, or a list of captions")
    tidied = [tidy for caption in captions if (tidy := _tidied(" ".join(caption.split())))]
    return name.replace("\\", "/").removeprefix("./"), Sidecar(file, tidied, _box(entry.get("crop")))


def _box(given: Any) -> Box | None:
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 4 or not all(type(edge) in (int, float) for edge in given):
        raise ValueError("its crop should be four numbers: left, top, right and bottom in pixels")
    left, top, right, bottom = map(float, given)
    if not 0 <= left < right or not 0 <= top < bottom:
        raise ValueError(f"its crop {given} holds nothing; it is left, top, right and bottom in pixels")
    return left, top, right, bottom


def _text(file: Path, most: int) -> str:
    """What is written in a file, in UTF-8, UTF-16 or Windows-1252. Raises UserError for what is no text."""
    try:
        with file.open("rb") as opened:
            content = opened.read(most + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); allow it, or delete it") from error
    if len(content) > most:
        raise UserError(f"{file}: is larger than captions are ({most // 1024} KiB); move it elsewhere")
    for encoding in _encodings(content):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise UserError(f"{file}: is no text; save it as UTF-8, or move it elsewhere")


def _encodings(content: bytes) -> list[str]:
    """What it can be, the likeliest first."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return ["utf-16"]
    if b"\0" in content:  # UTF-16 without a mark: of most letters one byte is zero
        return ["utf-16-le", "utf-16-be"] if content[1::2].count(0) >= content[::2].count(0) else ["utf-16-be"]
    return ["utf-8-sig", "windows-1252"]
