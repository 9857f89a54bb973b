"""What a denoiser is told beside the noisy latents: named tensors, a row a picture, each in a dtype of its own.

Rows are collated, moved and cast here and nowhere else. Numbers of floating point are cast to what the networks compute
in; whole numbers, as sizes in pixels, stay what they are: bfloat16 would make 1368 of 1366.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowvram_db.memory.device import sent

Conditioning = dict[str, Tensor]


def collated(rows: Sequence[Conditioning]) -> Conditioning:
    """Of pictures [...] each -> of a batch [len(rows), ...]."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def brought(conditioning: Conditioning, device: torch.device, dtype: torch.dtype) -> Conditioning:
    """On the device, and in `dtype` where that does not change what a number means."""
    there = {name: x if x.device == device else sent(x, device) for name, x in conditioning.items()}
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in there.items()}


def rows_at(conditioning: Conditioning, rows: list[int]) -> Conditioning:
    """Those rows, in that order."""
    return {name: tensor[rows] for name, tensor in conditioning.items()}


def rows_of(conditioning: Conditioning, rows: slice) -> Conditioning:
    return {name: tensor[rows] for name, tensor in conditioning.items()}
