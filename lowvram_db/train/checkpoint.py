"""Checkpoints: weights, optimizer state and step in one folder that is whole or absent.

Everything else that a step depends on is a function of the config, the data and the step number, so these three are
all that an exact resume needs.
"""

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from lowvram_db.atomic import creating_folder, remove_folder
from lowvram_db.config import Config
from lowvram_db.errors import UserError
from lowvram_db.files.reader import Reader
from lowvram_db.files.writer import write_tensors
from lowvram_db.optim.in_backward import InBackward
from lowvram_db.optim.storage import shapes

OPTIMIZER = "optimizer.safetensors"
AVERAGE = "ema.safetensors"  # where one is kept
FROZEN = "frozen.safetensors"  # where something was trained that is not any more
_FILES = ("state.json", OPTIMIZER)  # beside those of the trained networks
_METADATA = {"format": "pt"}  # which transformers wants to see in a file of weights
_FORMAT = 6  # and another one whenever what is stored changes its meaning, as adam8's codes may


@dataclass(frozen=True)
class State:
    """The small part of a checkpoint."""

    step: int  # optimizer steps done
    config: Config
    content: dict[str, list[str]]  # what was trained, and on what: digests of files and of pictures
    scaler: dict[str, Any]  # torch.amp.GradScaler's state; empty where none is in use
    optimizer: dict[str, Any]  # the optimizer state's plain numbers, by flattened name
    checksums: dict[str, int]  # CRC-32 of the other files


Files = dict[str, dict[str, Tensor]]  # tensors by their names, by the file's


@dataclass(frozen=True)
class Contents:
    """A whole checkpoint; its tensors may be those that are being trained."""

    state: State
    files: Files


class OtherVersion(UserError):
    """A checkpoint that this version of the program cannot read, whole as it may be."""


def steps(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by step, in order: what is called so, and says of itself that it is of that step."""
    return {step: path for step, path in _named(folder).items() if _step_of(path) == step}


def latest(folder: Path) -> Path | None:
    """The checkpoint of the last step in a folder."""
    return next(reversed(steps(folder).values()), None)


def unreadable(folder: Path) -> list[Path]:
    """What is called like a checkpoint, holds files of one, and does not say of which step."""
    return [
        path
        for path in _named(folder).values()
        if _step_of(path) is None and any((path / name).exists() for name in _FILES)
    ]


def _named(folder: Path) -> dict[int, Path]:
    matches = {path: re.fullmatch(r"step-(\d{6,})", path.name) for path in folder.glob("step-*")}
    return dict(sorted((int(match[1]), path) for path, match in matches.items() if match))


def _step_of(checkpoint: Path) -> int | None:
    """What state.json says, in whichever format; None where it cannot be read."""
    try:
        return int(json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def contents(
    state: State,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
) -> Contents:
    """What a checkpoint holds: live tensors, and `state` with the optimizer's plain numbers.

    trained: what the next step trains, by the names of network and tensor; each network's stand in a file of its own.
    The optimizer's parameters begin with it. average: of the same, if there is one. frozen: what earlier steps trained.
    """
    held = optimizer.state_dict()["state"].items()
    tensors, numbers = _flatten({place: state for place, state in held if place < len(trained)})
    files: Files = {}
    for name, tensor in trained.items():
        file, own_name = _place(name)
        files.setdefault(file, {})[own_name] = tensor.detach()
    files[OPTIMIZER] = tensors
    files |= {file: dict(of) for file, of in ((AVERAGE, average), (FROZEN, frozen)) if of}
    return Contents(replace(state, optimizer=numbers), files)


def _place(name: str) -> tuple[str, str]:
    """The file of a trained tensor, and its name in there."""
    network, _, own_name = name.partition(".")
    return f"{network}.safetensors", own_name


def save(folder: Path, contents: Contents) -> None:
    """Write a checkpoint into `folder`; its state's checksums are found here.

    Raises UserError when there is such a folder, or the disk is full.
    """
    with creating_folder(folder) as temporary:
        checksums = {
            name: write_tensors(temporary / name, tensors, metadata=_METADATA)
            for name, tensors in contents.files.items()
        }
        state = replace(contents.state, checksums=checksums)
        tree = {"format": _FORMAT, **state.__dict__, "config": state.config.model_dump()}
        (temporary / "state.json").write_text(json.dumps(tree), encoding="utf-8")


def read_state(folder: Path) -> State:
    """The small part, to check before the big one is read. Raises UserError for what is no checkpoint of ours."""
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            raise OtherVersion(
                f"{folder}: written by another version of lowvram-db; go on with that, or choose another output.name"
            )
        return State(**{**content, "config": Config.model_validate(content["config"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: damaged (state.json cannot be read: {error})") from error


def check_files(folder: Path, state: State) -> None:
    """Raise UserError where a file of a checkpoint is not as it was written."""
    for name, checksum in state.checksums.items():
        try:
            whole = _checksum(folder / name) == checksum
        except OSError as error:
            raise UserError(f"{folder}: damaged ({name} cannot be read: {error})") from error
        if not whole:
            raise UserError(f"{folder}: damaged ({name} is not as it was written)")


def _checksum(file: Path) -> int:
    """CRC-32: enough against a disk's lies, and as fast as the disk."""
    checksum = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 24):
            checksum = zlib.crc32(part, checksum)
    return checksum


def frozen(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint holds of what is not trained any more. Raises UserError for a file that cannot be read."""
    try:
        with Reader(folder / FROZEN) as file:
            return {name: file[name].clone() for name in file.names}
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{folder}: damaged ({error})") from error


def restore(
    folder: Path,
    state: State,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Tensor],
) -> None:
    """Copy a checkpoint's tensors into the live ones and the optimizer, one after the other. Raises UserError for a
    file that does not fit."""
    try:
        if average:
            with Reader(folder / AVERAGE) as file:
                for name, mean in average.items():
                    mean.copy_(file[name])
        for name, tensors in groupby(trained, lambda name: _place(name)[0]):
            with Reader(folder / name) as file, torch.no_grad():
                for tensor in tensors:
                    trained[tensor].copy_(file[_place(tensor)[1]])
        with Reader(folder / OPTIMIZER) as file:
            _take_up(optimizer, _Stored(file, state.optimizer))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged ({error})") from error
    except ValueError as error:
        raise UserError(f"{folder}: {error}; start a new run with another output.name") from error


def _take_up(optimizer: torch.optim.Optimizer, stored: Mapping[int, dict[str, Any]]) -> None:
    """Raises ValueError for another optimizer's state."""
    if isinstance(optimizer, InBackward):
        optimizer.load_state_dict({"state": stored})
        return
    # The others' load_state_dict keeps the tensors that it is given, or a copy of all of them.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, parameter in enumerate(parameters):
        own, theirs = optimizer.state[parameter], stored.get(place, {})
        if shapes(own) != shapes(theirs):
            raise ValueError(f"state of parameter {place} is {shapes(theirs)}, not {shapes(own)}")
        for key, value in theirs.items():
            if isinstance(value, Tensor):
                own[key].copy_(value)
            else:
                own[key] = value


class _Stored(Mapping[int, dict[str, Any]]):
    """An optimizer's state by the place of the parameter, its tensors read when they are asked for."""

    def __init__(self, file: Reader, numbers: dict[str, Any]):
        self._file, self._numbers = file, numbers
        self._names: dict[int, dict[str, str]] = {}
        for name in [*file.names, *numbers]:
            place, *_, key = name.split("/")  # between them is what bitsandbytes wraps its state in
            self._names.setdefault(int(place), {})[key] = name

    def __getitem__(self, place: int) -> dict[str, Any]:
        numbers = self._numbers
        names = self._names[place].items()
        return {key: numbers[name] if name in numbers else self._file[name] for key, name in names}

    def __iter__(self) -> Iterator[int]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def keep_last(folder: Path, count: int) -> None:
    """Delete all but the last `count` checkpoints in a folder."""
    for old in list(steps(folder).values())[:-count]:
        remove_folder(old)


def _flatten(tree: dict[Any, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Nested dicts -> ("0/exp_avg": tensor), ("0/step": number)."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            inner_tensors, inner_numbers = _flatten(value, f"{name}/")
            tensors |= inner_tensors
            numbers |= inner_numbers
        elif isinstance(value, Tensor):
            tensors[name] = value
        else:
            numbers[name] = value
    return tensors, numbers
