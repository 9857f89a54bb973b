"""Addressed randomness: Philox 4x32-10 as plain tensor arithmetic.

A random number here is a function of where it is used -- (seed, step, sample, stream, element) -- and never of
how often somebody drew before. Resuming a run, changing the batch order or dropping a feature therefore leaves
every other draw as it was. The arithmetic is the one `tl.philox` and `tl.randn` do in Triton, so that a kernel can
redraw the same numbers from the same address.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

# int32 -> [0, 1): the largest float32 scale for which 2^31 * scale < 1, as Triton has it.
_UNIT_SCALE = 4.6566127342e-10
_SMALLEST_UNIFORM = 1.0e-7


def philox(seed: int, c0: Tensor, c1: int, c2: int, c3: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four independent 32-bit words for every counter (c0, c1, c2, c3) under the key `seed`.

    c0: int64 tensor of any shape with values in [0, 2^32). c1, c2, c3: in [0, 2^32). seed: in [0, 2^64).
    Returns four int64 tensors shaped like c0 with values in [0, 2^32).
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    x0, x1, x2, x3 = c0, torch.full_like(c0, c1), torch.full_like(c0, c2), torch.full_like(c0, c3)
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves exact.
        p0, p1 = x0 * _MULTIPLIER_0, x2 * _MULTIPLIER_1
        x0, x1, x2, x3 = ((p1 >> 32) & _MASK) ^ x1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ x3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return x0, x1, x2, x3


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
    word = philox(seed, torch.zeros(1, dtype=torch.int64), step, sample, stream)[0]
    return (int(word) * high) >> 32


def permutation(length: int, seed: int, *, step: int, stream: int) -> list[int]:
    """The numbers 0..length-1 in the random order that belongs to one address."""
    words = philox(seed, torch.arange(length, dtype=torch.int64), step, 0, stream)[0]
    return torch.argsort(words, stable=True).tolist()
