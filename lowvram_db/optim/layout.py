"""In which order the elements of a convolution's weight lie, and Adam8's state of one for the other order.

On a GPU they lie channels last, as its tensor cores read them; elsewhere as PyTorch makes them. A checkpoint goes from
one to the other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowvram_db.kernels import moment_code

_TO_NEAREST = 0x8000  # the bits that round so


def is_channels_last(tensor: Tensor) -> bool:
    """Whether its memory differs from that of a contiguous tensor, and is [N, H, W, C]."""
    last = torch.channels_last
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last)


def same_order(one: Tensor, other: Tensor) -> bool:
    """Whether elements of two tensors of one shape lie in the same order. Strides of a single element say nothing."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    return all(s == t for n, s, t in zip(one.shape, one.stride(), other.stride(), strict=True) if n > 1)


def relaid(state: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
    """Adam8's state of a 4-d tensor, for the order in which it does not lie: the same residual, and moments that are
    rounded once more, to the nearest, for a block has other weights in it."""
    channels_last, n = state["channels_last"], shape.numel()
    present = _blocks(torch.ones(n, dtype=torch.bool, device=state["codes"].device))
    u, root = moment_code.dequantize(_blocks(state["codes"]), state["scales"].unsqueeze(1))
    m, v = (_blocks(turned(moment.flatten()[:n], shape, channels_last)) for moment in (u * root, root * root))
    codes, scales, _ = moment_code.quantize(m, v, present, torch.full_like(m, _TO_NEAREST, dtype=torch.int32))
    other = {**state, "codes": codes.flatten()[:n].to(torch.int16), "scales": scales.squeeze(1)}
    if "residual" in state:
        other["residual"] = turned(state["residual"], shape, channels_last)
    return other


def turned(flat: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """A tensor's elements [n] in the other order; channels_last: whether they lie so."""
    n, c, h, w = shape
    if channels_last:
        return flat.view(n, h, w, c).permute(0, 3, 1, 2).reshape(-1)
    return flat.view(n, c, h, w).permute(0, 2, 3, 1).reshape(-1)


def _blocks(flat: Tensor) -> Tensor:
    """[n] -> [ceil(n / 256), 256], filled up with zeros."""
    blocks = math.ceil(len(flat) / moment_code.BLOCK)
    return pad(flat, (0, blocks * moment_code.BLOCK - len(flat))).view(-1, moment_code.BLOCK)
