"""Two moments of Adam in 16 bits: what the state holds, decoded and encoded.

Derived in docs/adam8.md. In short, for every weight one 16-bit word:

    v   9 or 10 bits: log2 v on a grid of 2^-e, hung from the largest v of its block of 256; rounded stochastically
    m   7 or 6 bits: the bias-corrected ratio u = m_hat / sqrt(v_hat), companded as u / (|u| + 1/2); rounded to nearest

and for every block one 32-bit word, the grid: its upper end and its kind, which tells e and who has the odd bit: m
where the block's v lie close together, v where they do not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import bits
from .launch import jit, tl

BLOCK = 256
# Kinds of a block 0 ... 4: v in steps of 2^-3, 2^-4 and 2^-5 octaves with 10 bits, in 2^-5 and 2^-6 with 9.
NARROW = 3  # the first kind with 9 bits of v and 7 of m; a factor of two below stands for that bit
COARSEST = 3  # e of kind 0, with which v's bits reach over all floats
LEVELS = 1023  # steps of the v grid below its upper end, with 10 bits
HALF = 32  # half of m's 64 places with 6 bits; the lowest stays free, so that there are as many on each side of zero
FULL = 33  # |u| / (|u| + MIDDLE) = 1 in levels of m. The last one is u = 7.75 at least, Adam's ends at 7.27
MIDDLE = 0.5  # the u that is bent to a half: the smaller, the finer the levels around zero, where most m are
REACHES = 1021 / 16, 1021 / 32, 509 / 32, 509 / 64  # octaves that kinds 1 to 4 have room for, two steps to spare
FAINTEST = 2.0**-126  # v below this counts as zero


class Format(NamedTuple):
    """How a block's words are to be read: each int32 [blocks, 1]."""

    steps: Tensor  # of v an octave
    levels: Tensor  # of v
    m_bits: Tensor
    half: Tensor  # m's places below zero, one more than above
    full: Tensor


def _format(kinds: Tensor) -> Format:
    narrow = (kinds >= NARROW).int()
    return Format(1 << (kinds + COARSEST - narrow), LEVELS >> narrow, 6 + narrow, HALF << narrow, FULL << narrow)


def _unbend(places: Tensor, full: Tensor) -> Tensor:
    """Levels of m -> u."""
    return MIDDLE * places / (full - places.abs())


def decode(words: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
    """State -> (u, sqrt(v)). words: int16 or int32 [blocks, 256]; grids: int32 [blocks, 1]. Both results float32."""
    word, form = words.int() & 0xFFFF, _format(grids & 15)
    levels = (word >> form.m_bits) + ((grids >> 4) - form.levels)
    places = (word & (2 * form.half - 1)) - form.half
    return _unbend(places.float(), form.full), torch.exp2(levels.float() * (0.5 / form.steps))


def encode(
    m: Tensor, v: Tensor, present: Tensor, random: Tensor, factor: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments -> (words, grids, what the state holds of m).

    m, v: float32 [blocks, 256]. present: bool, False where a block is filled up. random: int32 in [0, 2^16).
    factor: turns m / sqrt(v) into u. words: int32 in [0, 2^16). grids: int32 [blocks, 1].
    """
    log = torch.log2(v.clamp(min=FAINTEST))
    present = present & (v > FAINTEST)
    top = log.masked_fill(~present, math.log2(FAINTEST)).amax(1, keepdim=True)
    spread = top - log.where(present, top).amin(1, keepdim=True)
    kinds = torch.stack([spread <= reach for reach in REACHES]).sum(0, dtype=torch.int32)
    form = _format(kinds)
    top = torch.ceil(top * form.steps)
    exact = log * form.steps
    below = torch.floor(exact)
    levels = below + ((exact - below) * 65536 > random)
    levels = torch.minimum(torch.maximum(levels, top - form.levels), top)
    root = torch.exp2(levels * (0.5 / form.steps))
    u = m * factor / root
    places = torch.floor(u / (u.abs() + MIDDLE) * form.full + 0.5)
    places = torch.minimum(torch.maximum(places, 1 - form.half), form.half - 1)
    words = (levels - (top - form.levels)).int() << form.m_bits | (places.int() + form.half)
    return words, top.int() << 4 | kinds, _unbend(places, form.full) * root / factor


@jit
def _format_kernel(  # type: ignore[no-untyped-def]
    kinds, NARROW: tl.constexpr, COARSEST: tl.constexpr, LEVELS: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr
):
    """As _format, but v's steps as e."""
    narrow = (kinds >= NARROW).to(tl.int32)
    return kinds + COARSEST - narrow, LEVELS >> narrow, 6 + narrow, HALF << narrow, FULL << narrow


@jit
def decode_kernel(  # type: ignore[no-untyped-def]
    word, grid, MIDDLE: tl.constexpr,
    NARROW: tl.constexpr, COARSEST: tl.constexpr, LEVELS: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """As decode. word: int32 with 16 bits in use."""
    e, reach, m_bits, half, full = _format_kernel(grid & 15, NARROW, COARSEST, LEVELS, HALF, FULL)
    levels = (word >> m_bits) + ((grid >> 4) - reach)
    places = ((word & (2 * half - 1)) - half).to(tl.float32)
    u = MIDDLE * places / (full.to(tl.float32) - tl.abs(places))
    return u, tl.exp2(levels.to(tl.float32) * bits.as_float((126 - e) << 23))


@jit
def encode_kernel(  # type: ignore[no-untyped-def]
    m, v, there, random, factor, FAINTEST: tl.constexpr, REACHES: tl.constexpr, MIDDLE: tl.constexpr,
    NARROW: tl.constexpr, COARSEST: tl.constexpr, LEVELS: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """As encode; words come as int32."""
    log = tl.log2(tl.maximum(v, FAINTEST))
    present = there & (v > FAINTEST)
    top = tl.max(tl.where(present, log, -126.0), 1, keep_dims=True)
    spread = top - tl.min(tl.where(present, log, top), 1, keep_dims=True)
    kinds = (spread <= REACHES[0]).to(tl.int32) + (spread <= REACHES[1]).to(tl.int32)
    kinds += (spread <= REACHES[2]).to(tl.int32) + (spread <= REACHES[3]).to(tl.int32)
    e, reach, m_bits, half, full = _format_kernel(kinds, NARROW, COARSEST, LEVELS, HALF, FULL)
    lowest, full = reach.to(tl.float32), full.to(tl.float32)
    top = tl.ceil(top * bits.as_float((127 + e) << 23))
    exact = log * bits.as_float((127 + e) << 23)
    below = tl.floor(exact)
    up = (exact - below) * 65536 > bits.other_bits_kernel(random).to(tl.float32)
    levels = tl.minimum(tl.maximum(below + up.to(tl.float32), top - lowest), top)
    root = tl.exp2(levels * bits.as_float((126 - e) << 23))

    u = m * factor / root
    places = tl.floor(u / (tl.abs(u) + MIDDLE) * full + 0.5)
    last = (half - 1).to(tl.float32)
    places = tl.minimum(tl.maximum(places, -last), last)
    kept = MIDDLE * places / (full - tl.abs(places)) * root / factor
    words = ((levels - (top - lowest)).to(tl.int32) << m_bits) | (places.to(tl.int32) + half)
    return words, (top.to(tl.int32) << 4) | kinds, kept


CONSTANTS = {
    "FAINTEST": FAINTEST, "REACHES": REACHES, "MIDDLE": MIDDLE, "NARROW": NARROW, "COARSEST": COARSEST,
    "LEVELS": LEVELS, "HALF": HALF, "FULL": FULL,
}  # fmt: skip
