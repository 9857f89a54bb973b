"""One file a model family behind the interface of base.py; the only room that knows a model's name."""

from collections.abc import Callable
from pathlib import Path

from lowvram_db.errors import UserError
from lowvram_db.families.base import Family
from lowvram_db.families.sd import StableDiffusion
from lowvram_db.families.source import find_model, read_json

_FAMILIES: dict[str, Callable[[Path], Family]] = {"StableDiffusionPipeline": StableDiffusion}


def open_model(name: str, revision: str | None = None) -> Family:
    """Find a model and check what it is, from its config files alone. Raises UserError naming what does not fit."""
    folder = find_model(name, revision)
    index = read_json(folder / "model_index.json", "a model folder in diffusers' format has one")
    kind = index.get("_class_name")
    if kind not in _FAMILIES:
        raise UserError(f"{folder}: a {kind} cannot be trained here; supported: {', '.join(_FAMILIES)}")
    return _FAMILIES[kind](folder)
