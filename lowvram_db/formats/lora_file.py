"""A LoRA as a file that opens everywhere: in the layout of kohya-ss' sd-scripts, which web UIs, ComfyUI and diffusers
read, and, to be read only, in those of peft and diffusers.

No `lora_adapter_metadata` beside the alphas: diffusers refuses a file that has both.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_db.errors import UserError
from lowvram_db.files.writer import Planned, overflowing, values_of, write_hashed
from lowvram_db.formats.kinds import kind_of
from lowvram_db.formats.layout import LAYOUTS
from lowvram_db.formats.modelspec import HASH
from lowvram_db.formats.names import CLIP_PREFIX, UNET
from lowvram_db.formats.stored import Model
from lowvram_db.formats.tensors import Tensors, tensors_of
from lowvram_db.progress import say

BASE = "lowvram_db.base"  # in the header: base_of the model it was made for
_PREFIXES = {
    "sd1": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sd2": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
# diffusers knows these by the original code's names only.
_ORIGINAL = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight")
_UP = (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight")
_ALPHA = ".alpha"
_DORA = "is a DoRA, whose magnitudes programs compute in three ways that do not agree; get it as a plain LoRA"
# Of other adapters, by a part of their keys.
_NOT_READ = {
    "dora_scale": _DORA,
    "lora_magnitude_vector": _DORA,
    "hada_w": "is a LoHa, no LoRA; only LoRAs can be merged",
    "lokr_w": "is a LoKr, no LoRA; only LoRAs can be merged",
    "oft_": "is an OFT adapter, no LoRA; only LoRAs can be merged",
    "lora_mid": "is a LoRA of Tucker's form; get it as a plain one",
}


class LowRank(NamedTuple):
    """A change of one layer's weight: up @ down * alpha / rank."""

    down: Tensor  # [rank, in], of a convolution [rank, in, h, w]
    up: Tensor  # [out, rank], of a convolution [out, rank, 1, 1]
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (len(self.up), *self.down.shape[1:])

    def change(self) -> Tensor:
        """What is added to the weight, float32, on the device of the two."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return product.reshape(self.shape) * (self.alpha / self.rank)


# The names of network and layer, that of a text encoder's without CLIP's prefix: ("unet", "mid_block.resnets.0.conv1").
Layer = tuple[str, str]
Lora = dict[Layer, LowRank]


def plain(name: str) -> str:
    """A tensor's or layer's name, whichever version of transformers gave it."""
    return name.removeprefix(CLIP_PREFIX)


def write_lora(path: Path, family: str, lora: Lora, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write a LoRA for a model of a family. Raises OSError as the disk does, ValueError for numbers not finite."""
    planned: dict[str, Planned] = {}
    for layer, low in lora.items():
        if not all(bool(half.isfinite().all()) for half in low[:2]):
            raise ValueError(f"{'.'.join(layer)} holds numbers that are not finite")
        for ending, tensor, kind in (
            (_DOWN[0], low.down, dtype),
            (_UP[0], low.up, dtype),
            (_ALPHA, torch.tensor(low.alpha), torch.float32),
        ):
            planned[stem(family, layer) + ending] = Planned(kind, tuple(tensor.shape), partial(_itself, tensor))
    write_hashed(path, planned, {**_network(lora), **metadata}, HASH)


def _itself(tensor: Tensor) -> Tensor:
    return tensor.detach()


def stem(family: str, layer: Layer) -> str:
    """What the keys of a layer begin with."""
    part, name = layer
    full = name if part == "unet" else CLIP_PREFIX + name
    return _PREFIXES[family][part] + _ORIGINAL.get(full, full).replace(".", "_")


def _network(lora: Lora) -> dict[str, str]:
    """What sd-scripts, and the programs that go by it, say of a LoRA."""
    largest = max(lora.values(), key=lambda low: low.rank)
    has_kernels = any(math.prod(low.down.shape[2:]) > 1 for low in lora.values())
    said = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(largest.rank),
        "ss_network_alpha": f"{largest.alpha:g}",
    }
    if has_kernels:
        said["ss_network_args"] = json.dumps({"conv_dim": str(largest.rank), "conv_alpha": f"{largest.alpha:g}"})
    return said


def base_of(model: Model) -> str:
    """By which a LoRA knows the model it was made for: SHA-256 of the UNet's norms and biases in float16, the precision
    of most files."""
    sha = hashlib.sha256()
    for name, stored in sorted(model.parts["unet"].items()):
        if len(stored.shape) == 1:
            sha.update(name.encode())
            sha.update(values_of(stored.read().to(torch.float16).contiguous()))
    return sha.hexdigest()


def dtype_for(lora: Lora, dtype: torch.dtype, name: str) -> torch.dtype:
    """What a LoRA is written in, to a file of this name: `dtype`, or float32 where it holds numbers too large for that,
    which is said."""
    if overflowing((half for low in lora.values() for half in low[:2]), dtype):
        say(f"{name}: holds numbers too large for {str(dtype).removeprefix('torch.')}; it is saved in float32")
        return torch.float32
    return dtype


def read_lora(path: Path, model: Model, name: str) -> Lora:
    """The LoRA in a file, float32, for the layers of this model. name: what the user calls the model; where the LoRA
    says that it was made for another one, that is said.

    Raises UserError for what is no LoRA, for a layer that the model has not or in another shape, and for numbers that
    are not finite.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; name a LoRA (.safetensors)")
    with tensors_of(path) as file:
        _check_kind(file)
        layers = _layers_by_key(model)
        ends = {key: end for key in file.entries for end in _DOWN if key.endswith(end)}
        said = _said(file)
        lora: Lora = {}
        taken: set[str] = set()
        for key, end in ends.items():
            begins = key.removesuffix(end)
            up = begins + _UP[_DOWN.index(end)]
            layer = _layer(path, begins, layers, model)
            if layer in lora:
                raise UserError(f"{path}: changes {'.'.join(layer)} twice, by two names; get it as a plain LoRA")
            low = LowRank(_matrix(file, key), _matrix(file, up), 0.0)
            low = low._replace(alpha=_alpha(file, begins + _ALPHA, said(begins, low.rank)))
            _check_shape(path, begins, low, layers[begins][1])
            lora[layer] = low
            taken |= {key, up, begins + _ALPHA}
        if left := file.entries.keys() - taken:
            raise UserError(f"{path}: has {min(left)}, which is no part of a LoRA; only LoRAs can be merged")
        _warn_of_another_base(path, file.metadata, model, name)
        return lora


def _warn_of_another_base(path: Path, metadata: Mapping[str, str], model: Model, name: str) -> None:
    if metadata.get(BASE) not in (None, base_of(model)):
        title = metadata.get("ss_sd_model_name")
        trained_on = f"{title}, or that has been changed" if title else "another model"
        say(f"{path.name}: was not made for {name} but for {trained_on}; pictures may differ from its own")


def _check_kind(file: Tensors) -> None:
    for key in file.entries:
        for part, words in _NOT_READ.items():
            if part in key:
                raise UserError(f"{file.path}: {words}")
        for one, other in (*zip(_DOWN, _UP, strict=True), *zip(_UP, _DOWN, strict=True)):
            if key.endswith(one) and (half := key.removesuffix(one) + other) not in file.entries:
                raise UserError(
                    f"{file.path}: has {key} and no {half}; it is damaged, or was not downloaded to its end"
                )
    if not any(key.endswith(_DOWN) for key in file.entries):
        raise UserError(f"{file.path}: is {kind_of(file.entries).words}; a LoRA was expected")


def _layers_by_key(model: Model) -> dict[str, tuple[Layer, tuple[int, ...]]]:
    """Every layer that can be changed, with its weight's shape, by all that the keys for it may begin with."""
    found: dict[str, tuple[Layer, tuple[int, ...]]] = {}
    for part in _PREFIXES[model.family]:
        network = model.parts[part]
        original = {name: place.key for name, place in UNET.places(network).items()} if part == "unet" else {}
        for name, stored in network.items():
            if not name.endswith(".weight") or len(stored.shape) not in (2, 4):
                continue
            full = name.removesuffix(".weight")
            known = (part, plain(full)), stored.shape
            found |= dict.fromkeys([stem(model.family, known[0]), f"{part}.{full}", f"{part}.{plain(full)}"], known)
            if name in original:
                theirs = original[name].removesuffix(".weight").replace(".", "_")
                found[_PREFIXES[model.family][part] + theirs] = known
    return found


def _layer(path: Path, begins: str, layers: Mapping[str, tuple[Layer, tuple[int, ...]]], model: Model) -> Layer:
    if begins in layers:
        return layers[begins][0]
    for family, prefixes in _PREFIXES.items():
        for part, prefix in prefixes.items():
            if part not in LAYOUTS[model.family] and begins.startswith((prefix, f"{part}.")):
                raise UserError(f"{path}: changes {part}, which the model has not; it is for one of {family}")
    raise UserError(f"{path}: changes {begins}, which the model has not; it was made for another kind of model")


def _check_shape(path: Path, begins: str, low: LowRank, shape: tuple[int, ...]) -> None:
    if low.rank == 0 or low.down.numel() == 0:
        raise UserError(f"{path}: {begins} has a rank of 0, which changes nothing; it is damaged")
    inner = low.up.flatten(1).shape
    if inner[-1] != low.rank or math.prod(low.shape) != math.prod(shape) or low.shape[:2] != shape[:2]:
        raise UserError(
            f"{path}: {begins} changes a layer of {_size(low.shape)}, the model's is {_size(shape)}; it was made for "
            "another kind of model"
        )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _numbers(file: Tensors, key: str) -> Tensor:
    tensor = file[key].float().clone()
    if not tensor.isfinite().all():
        raise UserError(f"{file.path}: {key} holds numbers that are not finite (NaN or infinity); it is damaged")
    return tensor


def _matrix(file: Tensors, key: str) -> Tensor:
    """Or a convolution's, of four dimensions."""
    if len(file.entries[key].shape) not in (2, 4):
        raise UserError(f"{file.path}: {key} has {len(file.entries[key].shape)} dimensions, not 2 or 4; it is damaged")
    return _numbers(file, key)


def _alpha(file: Tensors, key: str, otherwise: float) -> float:
    if key not in file.entries:
        return otherwise
    if math.prod(file.entries[key].shape) != 1:
        raise UserError(f"{file.path}: {key} is not one number; it is damaged")
    return _numbers(file, key).item()


def _said(file: Tensors) -> Callable[[str, int], float]:
    """Gives the alpha of a layer that has none of its own: what diffusers and peft say in the header, else the rank."""
    try:
        tree = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
        tree = tree if isinstance(tree, dict) else {}
    except ValueError:
        tree = {}

    def alpha(begins: str, rank: int) -> float:
        part, _, layer = begins.partition(".")
        own = tree.get(f"{part}.alpha_pattern")
        said = (own if isinstance(own, dict) else {}).get(layer, tree.get(f"{part}.lora_alpha", rank))
        return float(said) if isinstance(said, int | float) and math.isfinite(said) else float(rank)

    return alpha
