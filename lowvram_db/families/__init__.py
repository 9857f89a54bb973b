"""One file a model family behind the interface of base.py; the only room that knows a model's name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram_db.errors import UserError
from lowvram_db.files.foreign import read_json
from lowvram_db.formats.source import find_configs, find_model
from lowvram_db.reading import AS_IT_IS, Reading

if TYPE_CHECKING:
    from lowvram_db.families.base import Family
    from lowvram_db.families.blank import Blank

# Imported when they are wanted: with torch and diffusers behind them they take seconds.
_FAMILIES = {
    "StableDiffusionPipeline": ("sd", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL"),
}
_BLANKS = {
    "StableDiffusionPipeline": ("sd", "BlankStableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "BlankStableDiffusionXL"),
}


# Pipelines that work on a picture beside the prompt, by a word in their names.
_OTHER_TASKS = {
    "Img2Img": "such a pipeline belongs to the refiner of Stable Diffusion XL; train the base model",
    "Inpaint": "it fills holes in pictures; train a text-to-image model",
    "Pix2Pix": "it edits pictures; train a text-to-image model",
}


def check_trainable(name: str, revision: str | None = None, reading: Reading = AS_IT_IS) -> None:
    """Raise UserError for a model that cannot be trained here, from its config files alone."""
    _class_for(find_configs(name, revision, reading), _FAMILIES, "trained")


def open_model(name: str, revision: str | None = None, reading: Reading = AS_IT_IS) -> Family:
    """Find a model and check what it is, from its config files alone. Raises UserError naming what does not fit.

    reading: what is known better than the model's own files know it.
    """
    configs = find_configs(name, revision, reading)
    family = _class_for(configs, _FAMILIES, "trained")
    open_blank(configs, reading.prediction_type)  # before gigabytes are downloaded in vain
    return family(find_model(name, revision, reading), reading.prediction_type)


def open_blank(folder: Path, prediction_type: str | None = None) -> Blank:
    """The model whose config files are in `folder`, without its weights. Raises UserError as open_model does."""
    from lowvram_db.families.trial import try_out  # heavy as the families are

    blank = _class_for(folder, _BLANKS, "planned")(folder, prediction_type)
    try_out(blank)
    return blank


def _class_for(folder: Path, classes: dict[str, tuple[str, str]], done: str) -> Any:
    kind = read_json(folder / "model_index.json", "a model folder in diffusers' format has one").get("_class_name")
    if not isinstance(kind, str) or kind not in classes:
        task = next((words for task, words in _OTHER_TASKS.items() if task in str(kind)), None)
        reason = task or f"supported: {', '.join(classes)}"
        raise UserError(f"{folder}: a {kind} cannot be {done} here; {reason}")
    module, name = classes[kind]
    return getattr(import_module(f"lowvram_db.families.{module}"), name)
