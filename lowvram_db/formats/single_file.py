"""A model of one file, opened as the folder in diffusers' format that it could have been.

The folder stands in the user's cache, under a name made of the file's own place and state. It has the config files, the
tokenizer, and instead of weights, for each network, the SHA-256 of its tensors: whatever goes by the content of a
part's files goes by what decides, and the same VAE in two files is the same. The tensors themselves stay where they
are, and are read from the file, one by one, when a network is made.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any, NamedTuple

from torch import Tensor

from lowvram_db import __version__
from lowvram_db.atomic import creating_folder
from lowvram_db.errors import UserError
from lowvram_db.files.foreign import naming, read_json
from lowvram_db.files.user_cache import user_cache
from lowvram_db.files.writer import values_of
from lowvram_db.formats.alone import file_of_part, part_alone
from lowvram_db.formats.architecture import config_of
from lowvram_db.formats.content import Places, check_numbers, content_of, missing, shapes_of
from lowvram_db.formats.forms import to_network
from lowvram_db.formats.kinds import FAMILY_WORDS
from lowvram_db.formats.known import family_folder
from lowvram_db.formats.layout import LAYOUTS
from lowvram_db.formats.names import Form
from lowvram_db.formats.prediction import Prediction, prediction_of
from lowvram_db.formats.tensors import Tensors, tensors_of
from lowvram_db.formats.tokenizer import END, find_vocabulary, write_tokenizer
from lowvram_db.progress import say
from lowvram_db.reading import AS_IT_IS, STAND_IN, Reading

_PLACES = "single_file.json"  # where they are
_FORMAT = 1  # of such folders
_PADS = {"sd1": [END], "sd2": ["!"], "sdxl": [END, "!"]}  # what fills up a prompt, for each text encoder
_PACKAGED = "it comes with the package"
_SUPPORTED = "Stable Diffusion 1.x, 2.x and XL"


def as_configs(path: Path, reading: Reading = AS_IT_IS) -> Path:
    """A folder with the config files of a model of one file.

    Raises UserError for a file that is damaged, is no model that can be trained, or lacks a part, and where it cannot
    be known what its UNet predicts.
    """
    return _made(_place("configs", path, reading), partial(_write_configs, path, reading))


def as_folder(path: Path, reading: Reading = AS_IT_IS) -> Path:
    """The same with the tokenizer, and with what stands for the weights. Raises UserError as as_configs does, and where
    no tokenizer is found."""
    configs = as_configs(path, reading)
    return _made(_place("model", path, reading), partial(_write_rest, path, reading, configs))


def _made(folder: Path, write: Callable[[Path], None]) -> Path:
    """A folder that is made once, by whichever process comes first."""
    if not folder.exists():
        try:
            with creating_folder(folder) as temporary:
                write(temporary)
        except (OSError, UserError):
            if not folder.exists():
                raise
    return folder


def _place(what: str, path: Path, reading: Reading) -> Path:
    """A name for what comes of this file, as it is now, read in this way."""
    named = [*reading.parts.values(), *([reading.tokenizer] if reading.tokenizer else [])]
    beside = [path, path.with_suffix(".yaml"), *(Path(name).expanduser() for name in named)]
    files = [str(place.absolute()) for place in beside] + [state_of(file) for place in beside for file in _files(place)]
    known = json.dumps([what, _FORMAT, __version__, files, asdict(reading)])
    try:
        return user_cache() / "models" / hashlib.sha256(known.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    except RuntimeError as error:
        raise UserError(f"model.name: {path}: no home folder is known for its configs; set XDG_CACHE_HOME") from error


def _files(place: Path) -> list[Path]:
    return sorted(place.rglob("*")) if place.is_dir() else [place]


def state_of(file: Path) -> str:
    """What changes when a file does; empty where there is none."""
    try:
        status = file.stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_dev} {status.st_ino}"


def _write_configs(path: Path, reading: Reading, folder: Path) -> None:
    with opened(path, reading) as model:
        prediction = prediction_of(model.file, model.family, reading.prediction_type)
        if prediction.type is None:
            raise UserError(
                f"{path}: whether its UNet predicts the noise or v is not said in it; set model.prediction_type to "
                '"epsilon" or "v_prediction", as the page that you have it from says'
            )
        known = "sd2-base" if model.family == "sd2" and prediction.type == "epsilon" else model.family
        for part, (source, places) in model.parts.items():
            with naming(source.path, f"no {part} of {FAMILY_WORDS[model.family]} can be made of its tensors"):
                config = config_of(part, known, shapes_of(places, source.entries))
            (folder / part).mkdir()
            _write_json(folder / part / "config.json", config)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", _schedule(known, prediction))
    _write_json(folder / "model_index.json", read_json(family_folder(known) / "model_index.json", _PACKAGED))


def _schedule(known: str, prediction: Prediction) -> dict[str, Any]:
    settings = read_json(family_folder(known) / "scheduler" / "scheduler_config.json", _PACKAGED)
    settings["prediction_type"] = prediction.type
    if prediction.zero_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return settings


def _write_rest(path: Path, reading: Reading, configs: Path, folder: Path) -> None:
    copytree(configs, folder, dirs_exist_ok=True)
    with opened(path, reading) as model:
        for place, pad in enumerate(_PADS[model.family]):
            suffix = f"_{place + 1}" if place else ""
            text = read_json(folder / f"text_encoder{suffix}" / "config.json", "")
            vocabulary = find_vocabulary(path, reading.tokenizer, text["vocab_size"])
            write_tokenizer(folder / f"tokenizer{suffix}", vocabulary, pad, text["max_position_embeddings"])
        say(f"{path.name}: {path.stat().st_size / 1e9:.1f} GB are read once, to know the model by its content")
        whole = {}
        for part, (source, places) in model.parts.items():
            _write_json(folder / part / STAND_IN, {"sha256": _digest(source, places)})
            whole[part] = {
                "file": str(source.path.absolute()),
                "state": state_of(source.path),
                "tensors": {name: [place.key, place.form] for name, place in places.items()},
            }
    _write_json(folder / _PLACES, whole)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _digest(file: Tensors, places: Places) -> str:
    """SHA-256 of a network's tensors: their names, kinds, shapes and bytes; of nothing else in the file."""
    sha = hashlib.sha256()
    for name, (key, form) in sorted(places.items()):
        tensor = to_network(file[key], form).contiguous()
        sha.update(f"{name} {file.entries[key].dtype} {tuple(tensor.shape)} ".encode())
        sha.update(values_of(tensor))
    return sha.hexdigest()


class Model(NamedTuple):
    """A single file that can be trained, open."""

    file: Tensors
    family: str
    parts: dict[str, tuple[Tensors, Places]]  # each with the file that it is in
    others: list[str]  # keys of what is of no network, nor was beside one that is another's now


@contextmanager
def opened(path: Path, reading: Reading = AS_IT_IS) -> Iterator[Model]:
    """Raises UserError for a file that is damaged, holds another kind of model, or lacks a part."""
    with ExitStack() as stack:
        file = stack.enter_context(tensors_of(path))
        content = content_of(file)
        if content.kind.family is None:
            raise UserError(f"{path}: is {content.kind.words}; {_SUPPORTED} can be trained")
        family, parts = content.kind.family, {part: (file, places) for part, places in content.parts.items()}
        if reading.ema:
            if not content.ema:
                raise UserError(f"model.ema: {path} has no averaged weights (model_ema.*); leave the key out")
            parts["unet"] = (file, content.averaged())
        for part, name in reading.parts.items():
            if part not in LAYOUTS[family]:
                raise UserError(f"model.{part}: {path} is {content.kind.words}, which has none; leave the key out")
            own = stack.enter_context(tensors_of(file_of_part(part, name)))
            parts[part] = (own, part_alone(own, family, part))
        if lacking := missing(family, parts):
            raise UserError(f"{path}: {lacking}")
        for network in parts.values():
            check_numbers(*network)
        replaced = tuple(LAYOUTS[family][part].prefix for part in reading.parts)
        yield Model(file, family, parts, [key for key in content.others if not key.startswith(replaced)])


def part_tensors(stand_in: Path) -> Iterator[tuple[str, str, Tensor]]:
    """Of the part that this file stands in for: diffusers' name, where that is for the user, and the tensor.

    Each is good until the next one is asked for. Raises UserError where the file has changed since it was opened.
    """
    part = read_json(stand_in.parent.parent / _PLACES, "it says where the weights are")[stand_in.parent.name]
    path = Path(part["file"])
    if state_of(path) != part["state"]:
        raise UserError(f"{path}: has changed since this run began; start again")
    with tensors_of(path) as file:
        places = sorted(part["tensors"].items(), key=lambda item: file.entries[item[1][0]].begin)
        for name, (key, form) in places:
            yield name, key, to_network(file[key], Form(form))


def file_behind(stand_in: Path) -> Path:
    """The user's file that has the weights."""
    return Path(
        read_json(stand_in.parent.parent / _PLACES, "it says where the weights are")[stand_in.parent.name]["file"]
    )
