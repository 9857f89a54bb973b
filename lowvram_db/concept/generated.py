"""Pictures that we made, told from the user's by form and content: each carries in itself how it was made.

So a folder of class images holds nothing but images, which every other program can open, and a picture may be copied,
renamed or moved without its origin being lost or mistaken.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lowvram_db.atomic import replacing_file

NAMES = r"class-\d{5,}\.png"
_CHUNK = "lowvram-db"  # keyword of the PNG text chunk, which stands before the pixels
_HEAD = 1 << 16  # bytes in which the first pixels would have begun


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what generated class images look like, but for each one's number."""

    model: str  # digest of the base model's files
    prompt: str
    resolution: int
    steps: int
    guidance: float
    seed: int
    prediction_type: str | None = None  # the setting, where there is one

    def changes(self, other: "Recipe") -> list[str]:
        """What differs, in words: "steps (30 -> 25)"."""
        old, new = asdict(self), asdict(other)
        return [
            "the model" if key == "model" else f"{key} ({old[key]!r} -> {new[key]!r})"
            for key in old
            if old[key] != new[key]
        ]


def name(number: int) -> str:
    return f"class-{number:05d}.png"


def save(image: Image.Image, path: Path, recipe: Recipe) -> None:
    """Write a picture with its recipe, whole or not at all. Raises UserError when the disk is full."""
    about = PngInfo()
    about.add_text(_CHUNK, json.dumps(asdict(recipe)))
    with replacing_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=about)


def is_ours(path: Path) -> bool:
    """Whether we made this file: it has such a name and carries a recipe, or nothing is in it that could be a picture,
    as after a power cut."""
    return bool(re.fullmatch(NAMES, path.name)) and (recipe_of(path) is not None or _holds_no_picture(path))


def recipe_of(path: Path) -> Recipe | None:
    """How one of our pictures was made; None for anything else."""
    try:
        with Image.open(path) as image:
            return Recipe(**json.loads(image.info[_CHUNK]))
    except Exception:  # whatever a foreign or damaged file makes Pillow raise
        return None


def _holds_no_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    return not head.strip(b"\0") or (len(head) < _HEAD and head.startswith(b"\x89PNG") and b"IDAT" not in head)
