"""How weights are kept in fewer bits than they are stepped in: widened to float32 and rounded back, stochastically.

A weight that has not moved is rounded to itself, whatever the random bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import bits
from .launch import jit, tl

_MODES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def mode_of(weight: Tensor, residual: Tensor | None) -> str:
    """How kernels are to read and write weights."""
    return "residual" if residual is not None else _MODES[weight.dtype]


def pattern(tensor: Tensor) -> Tensor:
    """bf16 travels as its bits: the interpreter's bf16 is not to be trusted, and widening bits is one instruction."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its memory, [n], without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def widen(weight: Tensor, residual: Tensor | None) -> Tensor:
    return weight.float() if residual is None else bits.join_bf16(weight, residual)


def narrow(w: Tensor, random: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Round float32 weights into their storage."""
    if residual is not None:
        nearest, rest = bits.split_bf16(w, random)
        weight.copy_(nearest)
        residual.copy_(rest)
        return
    short = {torch.bfloat16: bits.round_bf16, torch.float16: bits.round_fp16}.get(weight.dtype)
    weight.copy_(short(w, random) if short else w)


@jit
def float32(x):  # type: ignore[no-untyped-def]
    """What is stored as float32, fp16 or a bf16's pattern."""
    return bits.as_float(x.to(tl.int32) << 16) if x.dtype == tl.int16 else x.to(tl.float32)


@jit
def widen_kernel(weight, residual, place, there, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """As widen, of the weights at `place`."""
    w = tl.load(weight + place, there, 0)
    if MODE == "residual":
        return bits.join_bf16_kernel(w, tl.load(residual + place, there, 0))
    else:  # noqa: RET505  # Triton would compile what comes after a return, for a residual that is not there
        return float32(w)


@jit
def narrow_kernel(w, random, weight, residual, place, there, MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """As narrow, of the weights at `place`."""
    if MODE == "residual":
        nearest, rest = bits.split_bf16_kernel(w, random)
        tl.store(weight + place, nearest, there)
        tl.store(residual + place, rest, there)
    elif MODE == "bf16":
        tl.store(weight + place, bits.round_bf16_kernel(w, random), there)
    elif MODE == "fp16":
        tl.store(weight + place, bits.round_fp16_kernel(w, random), there)
    else:
        tl.store(weight + place, w, there)
