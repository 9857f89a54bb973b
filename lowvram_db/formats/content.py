"""Which tensor of which network each tensor of a single file is, and which are none."""

from collections.abc import Collection
from dataclasses import dataclass

from lowvram_db.errors import UserError
from lowvram_db.formats.header import Described, Entry
from lowvram_db.formats.kinds import Kind, kind_of
from lowvram_db.formats.layout import EMA_PREFIX, LAYOUTS, UNET_PREFIX
from lowvram_db.formats.names import CLIP, OPENCLIP, Names, Place, in_network

TRAINABLE = ("F64", "F32", "F16", "BF16")

Places = dict[str, Place]  # by diffusers' names, with whole keys


@dataclass(frozen=True)
class Content:
    """What a model's file holds. Of a kind that cannot be trained, `parts` is empty."""

    kind: Kind
    parts: dict[str, Places]  # by the names of folders in diffusers' format, without those that it lacks
    ema: bool  # whether it has the UNet's averaged weights, too
    others: list[str]  # keys of what is of no network, averaged weights among them

    def averaged(self) -> Places:
        """The UNet's tensors, by where its averaged weights are."""
        return {name: place._replace(key=ema_key(place.key)) for name, place in self.parts["unet"].items()}


def content_of(file: Described) -> Content:
    """Raises UserError for tensors of a UNet that no network of the file's family has."""
    kind = kind_of(file.entries)
    parts: dict[str, Places] = {}
    for part, (prefix, names) in LAYOUTS[kind.family].items() if kind.family else ():
        inner = {key.removeprefix(prefix) for key in file.entries if key.startswith(prefix)}
        if places := with_prefix(names.names(held(inner, names, kind.family)), prefix):
            parts[part] = places
    taken = {place.key for places in parts.values() for place in places.values()}
    others = [key for key in file.entries if key not in taken]
    if kind.family and (strange := [key for key in others if key.startswith(UNET_PREFIX)]):
        raise UserError(
            f"{file.path}: has {strange[0]}, which no UNet of {kind.words} has; a distilled or changed one, perhaps, "
            "which cannot be trained here"
        )
    ema = bool(parts) and {ema_key(place.key) for place in parts["unet"].values()} <= set(others)
    return Content(kind, parts, ema, others)


def ema_key(key: str) -> str:
    """Where the averaged weights of a UNet's tensor are: all dots behind the first word are gone."""
    return EMA_PREFIX + key.removeprefix("model.").replace(".", "")


def held(keys: set[str], names: Names, family: str | None) -> set[str]:
    """The keys of a part without what a network of diffusers does not hold: Stable Diffusion 2.x listens to the last
    layer but one, and its encoder ends there; a file that was made of a diffusers folder may end there, too, and then
    has no projection."""
    if names is CLIP:
        return {key for key in keys if not key.startswith(("logit_scale", "text_projection"))}
    if names is not OPENCLIP or family != "sd2":
        return keys
    layers = [int(key.split(".")[2]) for key in keys if key.startswith("transformer.resblocks.")]
    last = f"transformer.resblocks.{max(layers, default=0)}."
    unheard = (last, "text_projection") if "text_projection" in keys else ("text_projection",)
    return {key for key in keys if not key.startswith(unheard)}


def with_prefix(places: Places, prefix: str) -> Places:
    """With whole keys."""
    return {name: place._replace(key=prefix + place.key) for name, place in places.items()}


def missing(family: str, parts: Collection[str]) -> str | None:
    """Which networks of a family are not among these, and how the user names one, in words; None where all are."""
    lacking = [part for part in LAYOUTS[family] if part not in parts]
    if not lacking:
        return None
    keys = ", ".join(f'model.{part} = "FILE or FOLDER"' for part in lacking)
    return f"has no {' and no '.join(lacking)}; name {'one' if len(lacking) == 1 else 'each'}, {keys}"


def shapes_of(places: Places, entries: dict[str, Entry]) -> dict[str, tuple[int, ...]]:
    """By diffusers' names, as a network has them. Raises ValueError for one that its form in the file cannot have."""
    return {name: in_network(entries[key].shape, form) for name, (key, form) in places.items()}


def check_numbers(file: Described, places: Places) -> None:
    """Raises UserError for weights that are stored as no numbers to train with."""
    for place in places.values():
        if (dtype := file.entries[place.key].dtype) not in TRAINABLE:
            raise UserError(
                f"{file.path}: {place.key} is stored as {dtype}; float32, float16 and bfloat16 weights can be trained: "
                "get the model in one of these"
            )
