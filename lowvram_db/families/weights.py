"""Weights from disk into a network that has none yet, each checked and narrowed as it is read.

`from_pretrained` fills what a file lacks with random numbers, leaves out what it does not know, and brings a whole
network in one dtype; a bf16 denoiser whose small tensors stay exact would pass through memory in fp32 first, at twice
the size it is going to have.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lowvram_db.errors import UserError
from lowvram_db.files.foreign import naming
from lowvram_db.files.pickled import unpickle
from lowvram_db.files.reader import Reader
from lowvram_db.formats.names import CLIP_COUNT, CLIP_PREFIX, FORMERLY
from lowvram_db.formats.single_file import file_behind, part_tensors
from lowvram_db.reading import STAND_IN

Narrow = Callable[[Tensor], Tensor]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def read_weights(build: Callable[[], nn.Module], files: list[Path], narrow: Narrow) -> Any:
    """The network that `build` makes, in eval mode, its tensors `narrow`(float32 tensor) of `files`, contiguous.

    Raises UserError for a file that cannot be read, and unless the files hold every tensor of the network once, in its
    shape, with finite floating-point numbers, and no other.
    """
    with _without_weights():
        network = build().eval()
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    plain = {name.removeprefix(CLIP_PREFIX): name for name in shapes}
    state: dict[str, Tensor] = {}
    for listed in files:
        file = file_behind(listed) if listed.name == STAND_IN else listed
        with naming(file, "cannot be read; it is damaged, or was not downloaded to its end"):
            for stored, key, tensor in _tensors(listed):
                name = _name_now(stored, plain)
                if name is None:
                    continue
                if name in state:
                    raise UserError(f"{file}: has {key} once more; each tensor belongs into one file")
                if name not in shapes:
                    raise UserError(f"{file}: has a tensor {key}, which a network of config.json has not")
                if tensor.shape != shapes[name]:
                    raise UserError(f"{file}: {key} is {_size(tensor.shape)}, by config.json {_size(shapes[name])}")
                state[name] = narrow(_exact(file, key, tensor))
    missing = shapes.keys() - state.keys()
    if missing:
        raise UserError(
            f"{file}: has no tensor {min(missing)}, which a network of config.json has"
            + (f" ({len(missing)} are missing)" if len(missing) > 1 else "")
        )
    network.load_state_dict(state, assign=True)
    return network


@contextmanager
def _without_weights() -> Iterator[None]:
    """Parameters of the networks built inside have shapes and no memory; buffers, which files leave out, are made."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        empty = None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, empty)

    with patch.object(nn.Module, "register_parameter", register_empty):
        yield


def _tensors(file: Path) -> Iterator[tuple[str, str, Tensor]]:
    """By the format's own names, and by those that the user's file has."""
    if file.name == STAND_IN:
        yield from part_tensors(file)
        return
    if file.suffix == ".safetensors":
        with Reader(file) as reader:
            yield from ((name, name, reader[name]) for name in reader.names)
        return
    state = unpickle(file)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{file}: holds other things than tensors by their names")
    yield from ((str(name), str(name), tensor) for name, tensor in state.items())


def _name_now(stored: str, plain: dict[str, str]) -> str | None:
    """The network's own name for a tensor stored under one of today or of former versions; None for none it needs.

    plain: the network's names by what they are without CLIP's prefix.
    """
    name = stored.removeprefix(CLIP_PREFIX)
    if name == CLIP_COUNT and name not in plain:
        return None
    if name not in plain:
        for former, now in FORMERLY.items():
            if name.replace(former, now) in plain:
                name = name.replace(former, now)
    return plain.get(name, stored)


def _exact(file: Path, name: str, tensor: Tensor) -> Tensor:
    """A tensor in float32 and in memory of its own. Raises UserError where that is not what it means."""
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
        kind = str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
        raise UserError(f"{file}: {name} is stored as {kind}; float32, float16 and bfloat16 weights can be trained")
    exact = tensor.to(torch.float32, copy=True).contiguous()
    # A sum is not finite where one of its numbers is not, and takes no memory; it could also be too large for itself.
    if not cast(bool, exact.sum().isfinite().item()) and not cast(bool, exact.isfinite().all().item()):
        raise UserError(f"{file}: {name} holds numbers that are not finite (NaN or infinity); the file is damaged")
    return exact


def _size(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "a single number"
