"""Addressed randomness and rounding by explicit bits, in PyTorch and in Triton.

A random number here is a function of where it is used -- (seed, step, sample, stream, element) -- and never of
how often somebody drew before. Resuming a run, changing the batch order or dropping a feature therefore leaves
every other draw as it was. The arithmetic is the one `tl.philox` and `tl.randn` do in Triton, so that a kernel can
redraw the same numbers from the same address.

Rounding to a shorter float adds to the bits that will be cut: half of the last kept place, or random bits. Both are
integer arithmetic on the float's pattern, exact on every device, where a cast may truncate or round as it likes.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11 (Philox 4x32-10).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .launch import jit, tl

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

# int32 -> [0, 1): the largest float32 scale for which 2^31 * scale < 1, as Triton has it.
_UNIT_SCALE = 4.6566127342e-10
_SMALLEST_UNIFORM = 1.0e-7


Number = int | Tensor  # an int64 tensor of one element, of a number that lies on a device
Counter = TypeVar("Counter", int, Tensor)


def philox(seed: Number, c0: Counter, c1: Number, c2: Number, c3: Number) -> tuple[Counter, Counter, Counter, Counter]:
    """Four independent 32-bit words for every counter (c0, c1, c2, c3) under the key `seed`.

    c0: int64 tensor of any shape with values in [0, 2^32), or one int. c1, c2, c3: in [0, 2^32). seed: in [0, 2^64).
    Returns four int64 tensors shaped like c0, or four ints, with values in [0, 2^32).
    """
    x0, x1, x2, x3 = cast(Any, (c0, c1, c2, c3))
    for k0, k1 in zip(_keys(seed, _WEYL_0), _keys(seed >> 32, _WEYL_1), strict=True):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves exact; Python's own do not wrap at all.
        p0, p1 = x0 * _MULTIPLIER_0, x2 * _MULTIPLIER_1
        x0, x1, x2, x3 = ((p1 >> 32) & _MASK) ^ x1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ x3 ^ k1, p0 & _MASK
    return x0, x1, x2, x3


def _keys(first: Number, weyl: int) -> Iterable[Number]:
    """Of all rounds; of a tensor in three operations, not thirty."""
    if isinstance(first, int):
        return [(first + weyl * number) & _MASK for number in range(_ROUNDS)]
    return ((torch.arange(_ROUNDS, device=first.device) * weyl + first) & _MASK).unbind()


def _uniform(words: Tensor) -> Tensor:
    """32-bit words (int64) -> float32 in [0, 1); the sign bit folds, so each value stands for two words."""
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return torch.where(signed < 0, -signed - 1, signed).float() * _UNIT_SCALE


def normal(shape: tuple[int, ...], seed: int, *, step: int, sample: int, stream: int) -> Tensor:
    """Standard normal float32 noise of `shape` at one address, on the CPU (Box-Muller on two of the four words)."""
    elements = torch.arange(math.prod(shape), dtype=torch.int64)
    w0, w1, _, _ = philox(seed, elements, step, sample, stream)
    radius = torch.sqrt(-2.0 * torch.log(_uniform(w0).clamp(min=_SMALLEST_UNIFORM)))
    return (radius * torch.cos(2.0 * math.pi * _uniform(w1))).reshape(shape)


def integer(high: int, seed: int, *, step: int, sample: int, stream: int) -> int:
    """One integer in [0, high), high <= 2^31, at one address."""
    return (philox(seed, 0, step, sample, stream)[0] * high) >> 32


def permutation(length: int, seed: int, *, step: int, stream: int) -> list[int]:
    """The numbers 0..length-1 in the random order that belongs to one address."""
    words = philox(seed, torch.arange(length, dtype=torch.int64), step, 0, stream)[0]
    return torch.argsort(words, stable=True).tolist()


def lanes(groups: Tensor, seed: Number, step: Number, sample: Number, stream: Number) -> Tensor:
    """Sixteen random bits for each of the eight elements of every group: one Philox call serves eight.

    groups: int64 [n], values in [0, 2^32). Returns int32 [n, 8], values in [0, 2^16).
    """
    words = philox(seed, groups, step, sample, stream)
    return torch.stack([half.int() for word in words for half in (word & 0xFFFF, word >> 16)], -1)


def other_bits(random: Tensor) -> Tensor:
    """Sixteen more bits from sixteen: a permutation of all values that leaves no simple relation between the two."""
    return (random * 40503) & 0xFFFF


def one_to_two(random: Tensor) -> Tensor:
    """int32 in [0, 2^16) -> float32 between 1 and 2, half a step of 2^-16 away from both: its other bits."""
    return 1 + (other_bits(random) + 0.5) * 2.0**-16


def round_bf16(x: Tensor, random: Tensor | None = None) -> Tensor:
    """float32 -> bf16: to nearest even, or up with the probability of the cut part, given int32 in [0, 2^16).

    A NaN stays a NaN, an infinity may become one: callers keep both out.
    """
    pattern = x.view(torch.int32)
    added = 0x7FFF + ((pattern >> 16) & 1) if random is None else random
    return ((pattern + added) >> 16).to(torch.int16).view(torch.bfloat16)


def split_bf16(x: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """float32 -> its nearest bf16 and what that leaves, int8, in units of 2^-8 of the bf16's last place.

    Together they are the upper 24 bits of the float, rounded stochastically with the low 8 of the `random` bits.
    """
    upper = (x.view(torch.int32) + (random & 0xFF)) >> 8
    nearest = (upper + 0x80) >> 8
    return nearest.to(torch.int16).view(torch.bfloat16), (upper - (nearest << 8)).to(torch.int8)


def join_bf16(nearest: Tensor, residual: Tensor) -> Tensor:
    """The float32 that split_bf16 has kept."""
    upper = (nearest.view(torch.int16).int() << 8) + residual.int()
    return (upper << 8).view(torch.float32)


def round_fp16(x: Tensor, random: Tensor) -> Tensor:
    """float32 -> fp16, up with the probability of the cut part, given int32 in [0, 2^16).

    Below 2^-14 fp16 has fixed places of 2^-24: there the part to cut is found by arithmetic.
    """
    normal = ((x.view(torch.int32) + (random & 0x1FFF)) & ~0x1FFF).view(torch.float32)
    places = torch.floor(x.abs() * 2.0**24 + (random & 0x1FFF) * 2.0**-13)
    small = torch.copysign(places * 2.0**-24, x)
    return torch.where(x.abs() < 2.0**-14, small, normal).half()


@jit
def lanes_kernel(groups, seed, step, sample, stream):  # type: ignore[no-untyped-def]
    """As lanes: int [rows, n] -> int32 [rows, 8 n]."""
    w0, w1, w2, w3 = tl.philox(seed, groups.to(tl.uint32), step, sample, stream)
    # A join adds the fastest place: eight lanes become three binary places, the first join the slowest.
    even = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(even, odd), (groups.shape[0], 8 * groups.shape[1])).to(tl.int32)


@jit
def other_bits_kernel(random):  # type: ignore[no-untyped-def]
    return (random * 40503) & 0xFFFF


@jit
def one_to_two_kernel(random):  # type: ignore[no-untyped-def]
    """As one_to_two: the bits as a float's fraction, with the last half below them."""
    return as_float((other_bits_kernel(random) << 7) | 0x3F800040)


@jit
def as_bits(x):  # type: ignore[no-untyped-def]
    return x.to(tl.int32, bitcast=True)


@jit
def as_float(pattern):  # type: ignore[no-untyped-def]
    return pattern.to(tl.float32, bitcast=True)


@jit
def round_bf16_kernel(x, random):  # type: ignore[no-untyped-def]
    """As round_bf16 with random bits; returns the pattern, int16."""
    return ((as_bits(x) + random) >> 16).to(tl.int16)


@jit
def split_bf16_kernel(x, random):  # type: ignore[no-untyped-def]
    """As split_bf16; returns the bf16's pattern, int16, and the int8 residual."""
    upper = (as_bits(x) + (random & 0xFF)) >> 8
    nearest = (upper + 0x80) >> 8
    return nearest.to(tl.int16), (upper - (nearest << 8)).to(tl.int8)


@jit
def join_bf16_kernel(pattern, residual):  # type: ignore[no-untyped-def]
    return as_float(((pattern.to(tl.int32) << 8) + residual.to(tl.int32)) << 8)


@jit
def round_fp16_kernel(x, random):  # type: ignore[no-untyped-def]
    """As round_fp16."""
    normal = as_float((as_bits(x) + (random & 0x1FFF)) & ~0x1FFF)
    magnitude = tl.abs(x)
    small = (
        tl.floor(magnitude * 16777216.0 + (random & 0x1FFF).to(tl.float32) * 0.0001220703125) * 5.9604644775390625e-08
    )
    small = tl.where(x < 0, -small, small)
    return tl.where(magnitude < 6.103515625e-05, small, normal).to(tl.float16)
