"""A network that a user names beside a model's file: in a file of its own, in another model's, or in a folder."""

import re
from pathlib import Path

from lowvram_db.errors import UserError
from lowvram_db.formats.content import Places, held, with_prefix
from lowvram_db.formats.header import Described
from lowvram_db.formats.layout import LAYOUTS
from lowvram_db.formats.names import CLIP, OPENCLIP, VAE, Names, Place, name_now

_FOLDER_FILES = {"vae": "diffusion_pytorch_model.safetensors"}
_TEXT_FILE = "model.safetensors"
# Where a file that has nothing else has them in the original layout; CLIP's is there what it is in transformers.
_PREFIXES: dict[Names, tuple[str, ...]] = {VAE: ("vae.", ""), OPENCLIP: ("",), CLIP: ()}
_OWN_NAMES = {
    VAE: r"encoder\.down_blocks\.",
    OPENCLIP: r"(text_model\.)?encoder\.layers\.",
    CLIP: r"(text_model\.)?encoder\.layers\.",
}  # diffusers' or transformers'
_SPOKEN = {"vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
_BESIDE = ("logit_scale", "position_ids")  # of no network here


def file_of_part(part: str, name: str) -> Path:
    """The file that `model.PART = name` means. Raises UserError where there is none."""
    place = Path(name).expanduser()
    if place.is_dir():
        file = _FOLDER_FILES.get(part, _TEXT_FILE)
        found = next((path for path in (place / file, place / part / file) if path.is_file()), None)
        if found is None:
            raise UserError(f"model.{part}: {place} holds no {file}; name a {_SPOKEN[part]}'s file or folder")
        return found
    if not place.is_file():
        raise UserError(f"model.{part}: no file or folder {place.absolute()}")
    return place


def part_alone(file: Described, family: str, part: str) -> Places:
    """Where a family's VAE or text encoder is in a file, in the original layout or by diffusers' names.

    Raises UserError where it has none, or more than that beside diffusers' names.
    """
    names = LAYOUTS[family][part].names
    if any(re.match(_OWN_NAMES[names], key) for key in file.entries):
        return _by_own_names(file, family, part)
    others = [there.prefix for layout in LAYOUTS.values() for there in layout.values() if there.names is names]
    for prefix in (*others, *_PREFIXES[names]):
        inner = {key.removeprefix(prefix) for key in file.entries if key.startswith(prefix)}
        if places := names.names(held(inner, names, family)):
            return with_prefix(places, prefix)
    raise UserError(f"model.{part}: {file.path} has no {_SPOKEN[part]} of Stable Diffusion")


def _by_own_names(file: Described, family: str, part: str) -> Places:
    names, own = LAYOUTS[family][part].names, [key for key in file.entries if not key.endswith(_BESIDE)]
    places = names.places(own)
    if strange := [key for key in own if key not in places]:
        raise UserError(f"model.{part}: {file.path} has {strange[0]}, which no {_SPOKEN[part]} of Stable Diffusion has")
    wanted = held({place.key for place in places.values()}, names, family)
    return {name_now(part, name): Place(name) for name, place in places.items() if place.key in wanted}
