"""A LoRA put into a model's weights, tensor by tensor, as the model is read."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_db.formats.lora_file import Lora, LowRank, plain
from lowvram_db.formats.stored import Model, Network, Readable


class _Merged(NamedTuple):
    """A tensor of a network with what a LoRA changes of it."""

    stored: Readable
    low: LowRank
    weight: float

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def read_as(self) -> torch.dtype:
        """float32: to be rounded once, when it is written."""
        return torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def read(self) -> Tensor:
        return self.stored.read().float() + self.weight * self.low.change().reshape(self.shape)


def merged(model: Model, lora: Lora, weight: float = 1.0) -> Model:
    """The model with its weights changed, `weight` times what the LoRA changes. It reads as the model does."""
    parts: dict[str, Network] = {
        part: {
            name: _Merged(stored, lora[layer], weight) if (layer := _layer(part, name)) in lora else stored
            for name, stored in network.items()
        }
        for part, network in model.parts.items()
    }
    return replace(model, parts=parts)


def _layer(part: str, name: str) -> tuple[str, str]:
    layer, _, kind = plain(name).rpartition(".")
    return part, layer if kind == "weight" else ""


def changes(lora: Lora) -> dict[str, Callable[[], Tensor]]:
    """What a LoRA adds, by the names of network and tensor."""
    return {f"{part}.{layer}.weight": low.change for (part, layer), low in lora.items()}
