"""Checkpoints: weights, optimizer state and step in one folder that is whole or absent.

Everything else that a step depends on is a function of the config, the data and the step number, so these three are
all that an exact resume needs.
"""

import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowvram_db.atomic import creating_folder, remove_folder
from lowvram_db.config import Config
from lowvram_db.errors import UserError

_FILES = ("state.json", "optimizer.safetensors")  # beside those of the trained networks
_FORMAT = 4  # and another one whenever what is stored changes its meaning, as adam8's words do with their code


@dataclass(frozen=True)
class State:
    """The small part of a checkpoint."""

    step: int  # optimizer steps done
    config: Config
    content: dict[str, list[str]]  # what was trained, and on what: digests of files and of pictures
    scaler: dict[str, Any]  # torch.amp.GradScaler's state; empty where none is in use
    optimizer: dict[str, Any]  # the optimizer state's plain numbers, by flattened name
    checksums: dict[str, int]  # CRC-32 of the other files


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


def save(
    folder: Path,
    state: State,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint into `folder`; its state's numbers of the optimizer and checksums are found here.

    Raises UserError when there is such a folder, or the disk is full.
    """
    tensors, numbers = _flatten(optimizer.state_dict()["state"])
    tensors = _apart(tensors)
    with creating_folder(folder) as temporary:
        for name, module in modules.items():
            save_file(module.state_dict(), temporary / f"{name}.safetensors")
        save_file(tensors, temporary / "optimizer.safetensors")
        checksums = {file.name: _checksum(file) for file in temporary.iterdir()}
        state = replace(state, optimizer=numbers, checksums=checksums)
        content = {"format": _FORMAT, **state.__dict__, "config": state.config.model_dump()}
        (temporary / "state.json").write_text(json.dumps(content), encoding="utf-8")


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


def restore(folder: Path, state: State, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Copy a checkpoint's tensors into live modules and optimizer. Raises UserError for a file that does not fit."""
    try:
        for name, module in modules.items():
            _copy_weights(folder / f"{name}.safetensors", module)
        tensors = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged ({error})") from error
    current = optimizer.state_dict()
    try:
        optimizer.load_state_dict({**current, "state": _unflatten(tensors, state.optimizer)})
    except ValueError as error:
        raise UserError(f"{folder}: {error}; start a new run with another output.name") from error
    _let_go_of(tensors.values(), optimizer)


def keep_last(folder: Path, count: int) -> None:
    """Delete all but the last `count` checkpoints in a folder."""
    for old in list(steps(folder).values())[:-count]:
        remove_folder(old)


def _let_go_of(mapped: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Copy what the optimizer has taken over of a mapped file as it was, as torch's own do on a CPU: Windows neither
    renames nor deletes a file that is mapped."""
    addresses = {tensor.untyped_storage().data_ptr() for tensor in mapped}
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in addresses:
                state[name] = value.clone()


def _copy_weights(path: Path, module: nn.Module) -> None:
    """Tensor by tensor, so that the weights are never in memory twice."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(file.get_tensor(name))


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


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory (bitsandbytes' code tables), copied: safetensors writes none twice."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return apart


def _unflatten(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> dict[int, Any]:
    tree: dict[int, Any] = {}
    for name, value in {**tensors, **numbers}.items():
        index, *parents, leaf = name.split("/")
        branch = tree.setdefault(int(index), {})
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return tree
