"""AdamW with two moments in 16 bits, one kernel a tensor: read the gradient, decode, update, encode, round, write.

What the state holds, and why, is derived in docs/adam8.md. In short, for every weight one 16-bit word:

    v   9 or 10 bits: log2 v on a grid of 2^-e, hung from the largest v of its block of 256; rounded stochastically
    m   7 or 6 bits: the bias-corrected ratio u = m_hat / sqrt(v_hat), companded as u / (|u| + 1/2); rounded to nearest

and for every block one 32-bit word, the grid: its upper end and its kind, which tells e and who has the odd bit: m
where the block's v lie close together, v where they do not. An error made in rounding m would go on moving the weight
for 1 / (1 - beta1) steps; its whole future effect is known at once and is taken off the update at once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import bits
from .adam8_step import Step, on_device
from .launch import compiled_for_cpu, jit, tl

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
LIMIT = 1.5  # an update is no larger than this or, where that is more, than
TRUST = 0.9  # of what the moments say: such updates are rare in Adam, and most of them here are a code's error
ROWS = 4  # blocks a program of the kernel: one for every warp
CHUNK = 2**16  # elements the twin works on at once: they stay in a core's cache


class Address(NamedTuple):
    """Where rounding bits come from: with the element's place, the counter of a Philox draw."""

    seed: int
    step: int
    tensor: int
    stream: int


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


def new_weights(w: Tensor, m: Tensor, v: Tensor, kept: Tensor, step: Step) -> Tensor:
    """The AdamW update, from the exact moments and what the state will hold of m. All float32, any shape."""
    root = torch.sqrt(v) * step.unbias_root + step.eps
    plain = m * step.unbias_m / root
    reach = (plain.abs() * TRUST).clamp(min=LIMIT)
    update = plain - (kept - m) * step.foresee / root
    update = torch.minimum(torch.maximum(update, -reach), reach).clamp(-step.clamp, step.clamp)
    return w * step.decay - update * step.lr


def update_(
    weight: Tensor,
    residual: Tensor | None,
    grad: Tensor,
    words: Tensor,
    grids: Tensor,
    skipped: Tensor,
    unscale: Tensor,
    step: Step,
    address: Address,
    triton: bool,
) -> None:
    """One AdamW step in place.

    weight: [n], flat: bf16 (with `residual`, int8 [n]: 24 bits together), fp16 or float32. grad: [n], any of these.
    words: int16 [n] and grids: int32 [ceil(n / 256)], the state, read unless step.keep_* are 0. skipped: int32 [1],
    grows by the number of blocks left as they were because a gradient in them was not finite. unscale: float32 [1],
    multiplies the gradient; where it is NaN the whole tensor is left as it was.
    """
    if isinstance(weight, FakeTensor):  # there is nothing to compute, and the kernel needs no memory but its arguments
        return
    if triton:
        _launch(weight, residual, grad, words, grids, skipped, unscale, step, address)
        return
    numbers, where = on_device(step, weight.device), torch.tensor(address, device=weight.device)
    for first in range(0, len(weight), CHUNK):
        chunk = slice(first, first + CHUNK)
        blocks = slice(first // BLOCK, (first + CHUNK) // BLOCK)
        rest = None if residual is None else residual[chunk]
        state = words[chunk], grids[blocks], skipped
        _twin(weight[chunk], rest, grad[chunk], *state, unscale, numbers, where, first // 8)


def _twin(
    weight: Tensor,
    residual: Tensor | None,
    grad: Tensor,
    words: Tensor,
    grids: Tensor,
    skipped: Tensor,
    unscale: Tensor,
    numbers: Tensor,
    address: Tensor,
    first_group: int,
) -> None:
    """One chunk of update_: the kernel's meaning. Casts stay outside of what is compiled: 16-bit integers keep
    torch.compile from vectorising."""
    n = len(weight)
    whole = n == CHUNK and weight.device.type == "cpu"
    draw, advance = (_compiled_lanes, _compiled_advance) if whole else (bits.lanes, _advance)
    w, g = _blocks(_widen(weight, residual)), _blocks(grad.float())
    present = _blocks(torch.ones(n, dtype=torch.bool, device=weight.device))
    groups = torch.arange(first_group, first_group + w.numel() // 8, device=weight.device)
    random = draw(groups, *address).view_as(w)
    w, new_words, new_grids, finite = advance(
        w, g, _blocks(words).int(), grids.unsqueeze(1), random, present, unscale, numbers
    )
    skipped += (~finite).sum()
    grids.copy_(new_grids.squeeze(1))
    words.copy_(new_words.flatten()[:n])
    _narrow(w.flatten()[:n], random.flatten()[:n], weight, residual)


def _advance(
    w: Tensor,
    g: Tensor,
    words: Tensor,
    grids: Tensor,
    random: Tensor,
    present: Tensor,
    unscale: Tensor,
    numbers: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of whole blocks: new weights, words (int32) and grids, and which blocks could be stepped, bool."""
    step = Step(*numbers.unbind())  # type: ignore[arg-type]  # scalar tensors, which do as numbers do
    g = g * unscale
    square = g * g
    u, root = decode(words, grids)
    m = u * root * (step.keep_m * step.decode) + g * step.add_m
    v = root * root * step.keep_v + square * step.add_v
    new_words, new_grids, kept = encode(m, v, present, bits.other_bits(random), step.encode)
    new_w = new_weights(w, m, v, kept, step)
    finite = square.amax(1, keepdim=True) < math.inf  # a NaN is the largest of all
    return new_w.where(finite, w), new_words.where(finite, words), new_grids.where(finite, grids), finite


_compiled_lanes, _compiled_advance = compiled_for_cpu(bits.lanes), compiled_for_cpu(_advance)


def _blocks(flat: Tensor) -> Tensor:
    """[n] -> [blocks, 256], filled up with zeros."""
    if len(flat) % BLOCK == 0:
        return flat.view(-1, BLOCK)
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _widen(weight: Tensor, residual: Tensor | None) -> Tensor:
    return weight.float() if residual is None else bits.join_bf16(weight, residual)


def _narrow(w: Tensor, random: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Round the new weights into their storage."""
    if residual is not None:
        nearest, rest = bits.split_bf16(w, random)
        weight.copy_(nearest)
        residual.copy_(rest)
        return
    short = {torch.bfloat16: bits.round_bf16, torch.float16: bits.round_fp16}.get(weight.dtype)
    weight.copy_(short(w, random) if short else w)


@jit
def _format_kernel(  # type: ignore[no-untyped-def]
    kinds, NARROW: tl.constexpr, COARSEST: tl.constexpr, LEVELS: tl.constexpr, HALF: tl.constexpr, FULL: tl.constexpr
):
    """As _format, but v's steps as e."""
    narrow = (kinds >= NARROW).to(tl.int32)
    return kinds + COARSEST - narrow, LEVELS >> narrow, 6 + narrow, HALF << narrow, FULL << narrow


@jit
def _decode_kernel(  # type: ignore[no-untyped-def]
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
def _encode_kernel(  # type: ignore[no-untyped-def]
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


@jit(do_not_specialize=["seed", "counter", "tensor", "stream"])  # or 1 and every 16th would be kernels of their own
def _kernel(  # type: ignore[no-untyped-def]
    weight, residual, grad, words, grids, skipped, unscale, n,
    seed, counter, tensor, stream,
    lr, decay, eps, keep_m, add_m, keep_v, add_v, decode, encode, unbias_m, unbias_root, foresee, clamp,
    MODE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FAINTEST: tl.constexpr, REACHES: tl.constexpr,
    MIDDLE: tl.constexpr, NARROW: tl.constexpr, COARSEST: tl.constexpr, LEVELS: tl.constexpr, HALF: tl.constexpr,
    FULL: tl.constexpr, LIMIT: tl.constexpr, TRUST: tl.constexpr,
):  # fmt: skip
    """As _twin, ROWS blocks a program. MODE: the storage of weights, a key of _MODES."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    place = row * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = place < n
    here = row * BLOCK < n
    g = tl.load(grad + place, there, 0.0).to(tl.float32) * tl.load(unscale)
    word = tl.load(words + place, there, 0)
    grid = tl.load(grids + row, here, 0)
    groups = row * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
    random = bits.lanes_kernel(groups, seed, counter, tensor, stream)

    u, root = _decode_kernel(word.to(tl.int32) & 0xFFFF, grid, MIDDLE, NARROW, COARSEST, LEVELS, HALF, FULL)
    m = u * root * (keep_m * decode) + g * add_m
    v = root * root * keep_v + g * g * add_v
    new_word, new_grid, kept = _encode_kernel(
        m, v, there, random, encode, FAINTEST, REACHES, MIDDLE, NARROW, COARSEST, LEVELS, HALF, FULL
    )

    # update
    if MODE == "residual":
        pattern = tl.load(weight + place, there, 0)
        w = bits.join_bf16_kernel(pattern, tl.load(residual + place, there, 0))
    elif MODE == "bf16":
        w = bits.as_float(tl.load(weight + place, there, 0).to(tl.int32) << 16)
    else:
        w = tl.load(weight + place, there, 0.0).to(tl.float32)
    denominator = tl.sqrt(v) * unbias_root + eps
    plain = m * unbias_m / denominator
    reach = tl.maximum(tl.abs(plain) * TRUST, LIMIT)
    update = plain - (kept - m) * foresee / denominator
    update = tl.minimum(tl.maximum(update, -reach), reach)
    w = w * decay - tl.minimum(tl.maximum(update, -clamp), clamp) * lr

    # write, unless a gradient of the block is not finite
    bad = tl.max((g * g < float("inf")).to(tl.int32) ^ 1, 1, keep_dims=True)
    tl.atomic_add(skipped, tl.sum(bad), mask=tl.sum(bad) > 0)
    write = there & (bad == 0)
    tl.store(words + place, new_word.to(tl.int16), write)
    tl.store(grids + row, new_grid, here & (bad == 0))
    if MODE == "residual":
        nearest, rest = bits.split_bf16_kernel(w, random)
        tl.store(weight + place, nearest, write)
        tl.store(residual + place, rest, write)
    elif MODE == "bf16":
        tl.store(weight + place, bits.round_bf16_kernel(w, random), write)
    elif MODE == "fp16":
        tl.store(weight + place, bits.round_fp16_kernel(w, random), write)
    else:
        tl.store(weight + place, w, write)


_MODES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CONSTANTS = {
    "BLOCK": BLOCK, "FAINTEST": FAINTEST, "REACHES": REACHES, "MIDDLE": MIDDLE, "NARROW": NARROW,
    "COARSEST": COARSEST, "LEVELS": LEVELS, "HALF": HALF, "FULL": FULL, "LIMIT": LIMIT, "TRUST": TRUST,
}  # fmt: skip


def _launch(
    weight: Tensor,
    residual: Tensor | None,
    grad: Tensor,
    words: Tensor,
    grids: Tensor,
    skipped: Tensor,
    unscale: Tensor,
    step: Step,
    address: Address,
) -> None:
    # bf16 travels as its bit pattern: the interpreter's bf16 is not to be trusted, and no arithmetic is done in it.
    mode = "residual" if residual is not None else _MODES[weight.dtype]
    storage = weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight
    blocks = math.ceil(len(weight) / BLOCK)
    _kernel[(math.ceil(blocks / ROWS),)](
        storage, storage if residual is None else residual, grad, words, grids, skipped, unscale, len(weight),
        *address, *step, MODE=mode, ROWS=ROWS, **CONSTANTS,
    )  # fmt: skip
