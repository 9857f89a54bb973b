"""Write a short, commented TOML to start from; its comments come from the settings themselves."""

import contextlib
import json
import os
import shlex
import subprocess
from collections.abc import Sized
from pathlib import Path
from typing import Any

import tomli_w

from lowvram_db import folder_name
from lowvram_db.atomic import replacing_file
from lowvram_db.concept import crop_boxes, describe
from lowvram_db.concept.identifier import summary
from lowvram_db.concept.look import look, tell
from lowvram_db.concept.suggestions import suggest
from lowvram_db.config import Config, known_keys, parse
from lowvram_db.errors import UserError
from lowvram_db.formats.inspect import inspect
from lowvram_db.formats.known import known_configs
from lowvram_db.formats.source import at_hand
from lowvram_db.formats.tokens import Tokens, read_tokens
from lowvram_db.photos import find_photos
from lowvram_db.progress import say
from lowvram_db.sections import DEFAULT_IDENTIFIER, PEOPLE

# As configs/person-*.toml have it, where the reasons stand.
_OF_A_PERSON = {"subject.prompts": "person", "prior.prompts": "person", "train.crop": "buckets"}
# What people change, in the order in which they meet it; everything else stays at its default unless it is added.
_WRITTEN = ["model.name", "subject.photos", "subject.identifier", "subject.class"]
_OFFERED = [
    "subject.prompts", "subject.caption_dropout",
    "prior.enabled", "prior.weight", "prior.count", "prior.prompts", "prior.images",
    "train.resolution", "train.crop", "train.mask_weight", "train.variants", "train.flip",
    "train.steps", "train.lr", "train.batch", "train.accumulate", "train.max_norm",
    "train.schedule", "train.warmup", "train.seed",
    "train.gradient_checkpointing", "train.ema", "train.min_snr_gamma",
    "text_encoder.train",
    "cache.dir", "precision.compute", "precision.weights", "optimizer.name", "memory.vram",
    "sample.prompts", "sample.guidance", "sample.seeds", "sample.every",
    "checkpoint.minutes", "checkpoint.every", "checkpoint.keep", "output.dir", "output.dtype",
    "output.single_file",
]  # fmt: skip
_EXAMPLES: dict[str, Any] = {
    "prior.prompts": ["a photo of a {class}", "a picture of a {class}"],
    "prior.images": "class_images/dog",
    "cache.dir": "cache",
    "train.gradient_checkpointing": True,
    "train.min_snr_gamma": 5.0,
    "train.max_norm": 1.0,
    "train.ema": 0.999,
    "memory.vram": "12GiB",
    "precision.weights": "bf16",
    "checkpoint.every": 200,
}  # keys without a default


def write_config(path: Path, photos: str, class_noun: str, model: str, identifier: str | None = None) -> None:
    """Write `path` and check that it loads. Raises UserError where it exists already, its name cannot be a run's, or a
    photo is bad.

    identifier: default: the word of the model's vocabulary that means least.
    """
    name = path.name.removesuffix(".toml")
    if problem := folder_name.problem(name):
        raise UserError(f"NAME: {name!r} {problem}; choose another name")
    if path.exists():
        raise UserError(f"{path}: exists already; choose another name or edit it")
    encoders = _at_hand(model)
    word = identifier or _rare_word(encoders, class_noun)
    values: dict[str, Any] = dict(zip(_WRITTEN, [model, photos, word, class_noun], strict=True))
    values |= _OF_A_PERSON if class_noun.strip().lower() in PEOPLE else {}
    text = _toml(path, values | _what_suits(model))
    config = parse(text, path)
    found = find_photos(Path(photos).expanduser(), "--photos")
    tell(look(found, config.train.resolution))
    _say_what_is_beside(found, config)
    if encoders:
        say(summary(word, encoders, class_noun))
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _say_what_is_beside(photos: list[Path], config: Config) -> None:
    """Captions, crops and masks that are found and will count."""
    concept = describe(config, photos, [])
    if concept.captions:
        say(f"{_share(concept.captions, photos)} have captions, which go before subject.prompts")
    if crops := crop_boxes(photos):
        say(f"{_share(crops, photos)} have a crop, which goes before train.crop")
    if concept.masks:
        say(
            f"{_share(concept.masks, photos)} have a mask; what it hides counts {config.train.mask_weight} in the loss "
            "(train.mask_weight)"
        )


def _share(some: Sized, photos: Sized) -> str:
    return f"{len(some)} of {len(photos)} photos"


def train_command(path: Path) -> str:
    """The command that trains from `path`, as a shell takes it."""
    words = ["lowvram-db", "train", f"./{path}" if str(path).startswith("-") else str(path)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _at_hand(model: str) -> list[Tokens]:
    """What the text encoders of a model on this machine read; none of another, nor of one that cannot be trained."""
    if place := at_hand(model):
        with contextlib.suppress(UserError):
            return read_tokens(str(place))
    return []


def _rare_word(encoders: list[Tokens], class_noun: str) -> str:
    found = suggest(encoders, 1, class_noun) if encoders else []
    return found[0].word if found else DEFAULT_IDENTIFIER


def _what_suits(model: str) -> dict[str, Any]:
    """Settings that follow from what a model is, as far as that is known here. What cannot be trained is said."""
    place = Path(model).expanduser()
    if not place.exists():
        configs = known_configs(model)
        return {"train.resolution": inspect(configs).resolution} if configs else {}
    report = inspect(place)
    if report.problem:
        say(f"--model {model}: {report.kind} cannot be trained as it is: {report.problem}")
    suits = {"train.resolution": report.resolution, "output.dtype": report.precision}
    return {key: value for key, value in suits.items() if value is not None and value != "fp64"}


def _toml(path: Path, values: dict[str, Any]) -> str:
    fields = known_keys()
    lines = [
        f"# DreamBooth run {path.stem!r}: {train_command(path)}",
        "# Lines behind '# ' show the defaults; remove the mark to change one. Paths start from the current folder.",
    ]
    section = ""
    for key in _WRITTEN + _OFFERED:
        parent, leaf = key.rsplit(".", 1)
        if parent != section:
            lines += ["", f"[{parent}]"]
            section = parent
        field = fields[key]
        if key in values:
            lines.append(f"{tomli_w.dumps({leaf: values[key]}).strip()}  # {field.description}")
        else:
            default = _EXAMPLES.get(key, field.get_default())
            lines.append(f"# {leaf} = {json.dumps(default, ensure_ascii=False)}  # {field.description}")
    return "\n".join(lines) + "\n"
