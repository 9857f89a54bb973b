"""Two moments of Adam in 16 bits: quantized and dequantized.

Derived in docs/adam8.md. In short, every weight has a code of 16 bits:

    level   9 or 10 bits: log2 v on a grid of 2^-e, hung from the largest v of the weight's block of 256; rounded
            stochastically
    place   7 or 6 bits: the bias-corrected ratio u = m_hat / sqrt(v_hat), companded as u / (|u| + 1/2); rounded to
            nearest

and every block a scale of 32 bits: the grid's upper end and the block's kind, which tells e and who has the odd bit:
the place where the block's v lie close together, the level where they do not.

m stands here for Adam's first moment times sqrt(1 - beta2^t) / (1 - beta1^t), so that u = m / sqrt(v).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import bits
from .approximate import log2, reciprocal
from .launch import constant, jit, tl

BLOCK = 256
# Kinds of a block 0 ... 4: v in steps of 2^-3, 2^-4 and 2^-5 octaves with 10 bits, in 2^-5 and 2^-6 with 9.
NARROW = 3  # the first kind with 9 bits of v and 7 of m; a factor of two below stands for that bit
COARSEST = 3  # e of kind 0, with which the levels reach over all floats
LEVELS = 1023  # the highest level, with 10 bits
HALF = 32  # half of the 64 places of 6 bits; the lowest stays free, so that there are as many on each side of zero
FULL = 33  # |u| / (|u| + MIDDLE) = 1 in places. The last one is u = 7.75 at least, Adam's ends at 7.27
MIDDLE = 0.5  # the u that is bent to a half: the smaller, the denser the places around zero, where most u are
REACHES = 1021 / 16, 1021 / 32, 509 / 32, 509 / 64  # octaves that kinds 1 to 4 have room for, two levels to spare
FAINTEST = 2.0**-126  # v below this counts as zero


class Format(NamedTuple):
    """How a block's codes are to be read: each int32 [blocks, 1]."""

    steps: Tensor  # levels an octave
    last: Tensor  # level
    place_bits: Tensor
    half: Tensor  # the places below zero, one more than above
    full: Tensor


def _format(kinds: Tensor) -> Format:
    narrow = (kinds >= NARROW).int()
    return Format(1 << (kinds + COARSEST - narrow), LEVELS >> narrow, 6 + narrow, HALF << narrow, FULL << narrow)


def _unbend(places: Tensor, full: Tensor) -> Tensor:
    """Places -> u."""
    return MIDDLE * places / (full - places.abs())


def dequantize(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """State -> (u, sqrt(v)). codes: int16 or int32 [blocks, 256]; scales: int32 [blocks, 1]. Both results float32."""
    code, form = codes.int() & 0xFFFF, _format(scales & 15)
    levels = (code >> form.place_bits) + ((scales >> 4) - form.last)
    places = (code & (2 * form.half - 1)) - form.half
    return _unbend(places.float(), form.full), torch.exp2(levels.float() * (0.5 / form.steps))


def quantize(m: Tensor, v: Tensor, present: Tensor, random: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments -> (codes, scales, error): what the state will hold more of m than there is.

    m, v: float32 [blocks, 256]. present: bool, False where a block is filled up. random: int32 in [0, 2^16).
    codes: int32 in [0, 2^16). scales: int32 [blocks, 1]. error: float32 [blocks, 256].
    """
    present = present & (v >= FAINTEST)
    top = torch.log2(v.where(present, FAINTEST).amax(1, keepdim=True))
    bottom = torch.log2(v.where(present, math.inf).amin(1, keepdim=True))
    kinds = torch.stack([top - bottom <= reach for reach in REACHES]).sum(0, dtype=torch.int32)
    form = _format(kinds)
    top = torch.ceil(top * form.steps)
    lowest = top - form.last  # level 0
    # The nearest whole number of x + r - 1/2, for an r between 0 and 1: up with the probability of x's fraction.
    exact = torch.log2(v.where(v >= FAINTEST, 0.0)) * form.steps - (lowest + 1.5) + bits.one_to_two(random)
    levels = torch.minimum(torch.round(exact).clamp(min=0), form.last)
    root = torch.exp2((levels + lowest) * (0.5 / form.steps))
    u = m / root
    places = torch.round(u / (u.abs() + MIDDLE) * form.full)
    places = torch.minimum(torch.maximum(places, 1 - form.half), form.half - 1)
    codes = levels.int() << form.place_bits | (places.int() + form.half)
    return codes, top.int() << 4 | kinds, (_unbend(places, form.full) - u) * root


_NARROW, _COARSEST, _LEVELS = constant(NARROW), constant(COARSEST), constant(LEVELS)
_HALF, _FULL, _MIDDLE = constant(HALF), constant(FULL), constant(MIDDLE)
_REACH_1, _REACH_2, _REACH_3, _REACH_4 = map(constant, REACHES)
_FAINTEST_BITS = constant(0x00800000)
# Added to a float below 2^22 in size, it leaves the nearest whole number, to even, in the low bits of the pattern.
_ROUND = constant(1.5 * 2.0**23)
_WHOLE, _WHOLE_BITS = constant(2.0**23), constant(0x4B000000)


@jit
def _format_kernel(kinds):  # type: ignore[no-untyped-def]
    """As _format, but steps as e."""
    narrow = (kinds >= _NARROW).to(tl.int32)
    return kinds + _COARSEST - narrow, _LEVELS >> narrow, 6 + narrow, _HALF << narrow, _FULL << narrow


@jit
def _power_of_two(e):  # type: ignore[no-untyped-def]
    return bits.as_float((127 + e) << 23)


@jit
def _unbend_kernel(places, full):  # type: ignore[no-untyped-def]
    """As _unbend."""
    return places * reciprocal(full * (1 / _MIDDLE) - tl.abs(places) * (1 / _MIDDLE))


@jit
def dequantize_kernel(code, scale):  # type: ignore[no-untyped-def]
    """As dequantize. code: int32 with 16 bits in use."""
    e, last, place_bits, half, full = _format_kernel(scale & 15)
    lowest, half_step = ((scale >> 4) - last).to(tl.float32), _power_of_two(-1 - e)
    root = tl.exp2((code >> place_bits).to(tl.float32) * half_step + lowest * half_step)
    places = bits.as_float((code & (2 * half - 1)) | _WHOLE_BITS) - (_WHOLE + half.to(tl.float32))
    return _unbend_kernel(places, full.to(tl.float32)), root


@jit
def quantize_kernel(m, v, random):  # type: ignore[no-untyped-def]
    """As quantize, for v = 0 where a block is filled up; and whether all v of a block are finite, int1 [rows, 1]."""
    # Floats from zero up are ordered as their patterns are, with infinity and NaN above. The difference that runs below
    # zero becomes the largest of all.
    pattern = v.to(tl.uint32, bitcast=True)
    largest = tl.max(pattern, 1, keep_dims=True)
    least = tl.min(pattern - _FAINTEST_BITS, 1, keep_dims=True) + _FAINTEST_BITS
    finite = largest < 0x7F800000
    top = log2(tl.maximum(largest, _FAINTEST_BITS).to(tl.float32, bitcast=True))
    bottom = log2(tl.maximum(least, _FAINTEST_BITS).to(tl.float32, bitcast=True))
    spread = top - bottom
    kinds = (spread <= _REACH_1).to(tl.int32) + (spread <= _REACH_2).to(tl.int32)
    kinds += (spread <= _REACH_3).to(tl.int32) + (spread <= _REACH_4).to(tl.int32)
    e, last, place_bits, half, full = _format_kernel(kinds)
    steps, half_step = _power_of_two(e), _power_of_two(-1 - e)
    top = tl.ceil(top * steps)
    lowest = top - last.to(tl.float32)

    exact = log2(v) * steps - (lowest + 1.5) + bits.one_to_two_kernel(random)
    levels = tl.minimum(tl.maximum(exact + _ROUND, _ROUND), _ROUND + last.to(tl.float32))
    root = tl.exp2(levels * half_step + (lowest - _ROUND) * half_step)
    u = m * reciprocal(root)

    full = full.to(tl.float32)
    zero = _ROUND + half.to(tl.float32)  # so that the pattern's low bits hold the place plus half
    end = (half - 1).to(tl.float32)
    bent = u * reciprocal(tl.abs(u) + _MIDDLE) * full + zero
    bent = tl.minimum(tl.maximum(bent, zero - end), zero + end)
    error = (_unbend_kernel(bent - zero, full) - u) * root
    codes = bits.as_bits(levels) * (1 << place_bits) + bits.as_bits(bent)  # of _ROUND nothing stands in the low 16 bits
    return codes, (top.to(tl.int32) << 4) | kinds, error, finite
