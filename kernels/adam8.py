"""AdamW with two moments in 16 bits, one kernel a tensor: read the gradient, decode, update, encode, round, write.

What the state holds, and why, is derived in docs/adam8.md. In short, for every weight one 16-bit word:

    v   10 bits: log2 v on a grid of 2^-e, hung from the largest v of its block of 256; rounded stochastically
    m    6 bits: the bias-corrected ratio u = m_hat / sqrt(v_hat), companded as u / (|u| + 1); rounded to nearest

and for every block one 32-bit word, the grid: its upper end and e. An error made in rounding m would go on moving the
weight for 1 / (1 - beta1) steps; its whole future effect is known at once and is taken off the update at once.
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
LEVELS = 1023  # steps of the v grid below its upper end
FINEST = 7  # the grid's step is 2^-7 octaves, and twice as long for every time the block's spread asks for more reach
SIDE = 31  # levels of m on each side of zero
BENT = SIDE / 34  # |u| / (|u| + 1) of the last level, u = 10.3: Adam's ends at 7.27. u = 1, as in step 1, is a level
FAINTEST = 2.0**-126  # v below this counts as zero
LIMIT = 1.5  # no correction makes an update larger than this
ROWS = 4  # blocks a program of the kernel: one for every warp
CHUNK = 2**16  # elements the twin works on at once: they stay in a core's cache


class Address(NamedTuple):
    """Where rounding bits come from: with the element's place, the counter of a Philox draw."""

    seed: int
    step: int
    tensor: int
    stream: int


def _unbend(places: Tensor) -> Tensor:
    """Levels of m -> u."""
    bent = places.float() * (BENT / SIDE)
    return bent / (1 - bent.abs())


def decode(words: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
    """State -> (u, sqrt(v)). words: int16 or int32 [blocks, 256]; grids: int32 [blocks, 1]. Both results float32."""
    word = words.int() & 0xFFFF
    steps, top = (1 << (grids & 15)).float(), grids >> 4
    levels = (word >> 6) + (top - LEVELS)
    return _unbend((word & 63) - SIDE - 1), torch.exp2(levels.float() * (0.5 / steps))


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
    fineness = FINEST - sum((spread > (LEVELS - 2) / 2**e).int() for e in range(FINEST, FINEST - 4, -1))
    steps = (1 << fineness).float()
    top = torch.ceil(top * steps)
    exact = log * steps
    below = torch.floor(exact)
    levels = below + ((exact - below) * 65536 > random)
    levels = torch.minimum(torch.maximum(levels, top - LEVELS), top)
    root = torch.exp2(levels * (0.5 / steps))
    u = m * factor / root
    places = torch.floor(u / (u.abs() + 1) * (SIDE / BENT) + 0.5).clamp(-SIDE, SIDE)
    words = (levels - (top - LEVELS)).int() << 6 | (places.int() + SIDE + 1)
    return words, top.int() << 4 | fineness, _unbend(places) * root / factor


def new_weights(w: Tensor, m: Tensor, v: Tensor, kept: Tensor, step: Step) -> Tensor:
    """The AdamW update, from the exact moments and what the state will hold of m. All float32, any shape."""
    root = torch.sqrt(v) * step.unbias_root + step.eps
    plain = m * step.unbias_m / root
    reach = plain.abs().clamp(min=LIMIT)
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
def _decode_kernel(word, grid, LEVELS: tl.constexpr, SIDE: tl.constexpr, BENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """As decode. word: int32 with 16 bits in use."""
    levels = (word >> 6) + ((grid >> 4) - LEVELS)
    bent = ((word & 63) - (SIDE + 1)).to(tl.float32) * (BENT / SIDE)
    return bent / (1 - tl.abs(bent)), tl.exp2(levels.to(tl.float32) * bits.as_float((126 - (grid & 15)) << 23))


@jit
def _encode_kernel(  # type: ignore[no-untyped-def]
    m, v, there, random, factor,
    LEVELS: tl.constexpr, FINEST: tl.constexpr, SIDE: tl.constexpr, BENT: tl.constexpr, FAINTEST: tl.constexpr,
):  # fmt: skip
    """As encode; words come as int32."""
    log = tl.log2(tl.maximum(v, FAINTEST))
    present = there & (v > FAINTEST)
    top = tl.max(tl.where(present, log, -126.0), 1, keep_dims=True)
    spread = top - tl.min(tl.where(present, log, top), 1, keep_dims=True)
    fineness = FINEST - (spread > (LEVELS - 2) / 128).to(tl.int32) - (spread > (LEVELS - 2) / 64).to(tl.int32)
    fineness -= (spread > (LEVELS - 2) / 32).to(tl.int32) + (spread > (LEVELS - 2) / 16).to(tl.int32)
    top = tl.ceil(top * bits.as_float((127 + fineness) << 23))
    exact = log * bits.as_float((127 + fineness) << 23)
    below = tl.floor(exact)
    up = (exact - below) * 65536 > bits.other_bits_kernel(random).to(tl.float32)
    levels = tl.minimum(tl.maximum(below + up.to(tl.float32), top - LEVELS), top)
    root = tl.exp2(levels * bits.as_float((126 - fineness) << 23))

    u = m * factor / root
    places = tl.floor(u / (tl.abs(u) + 1) * (SIDE / BENT) + 0.5)
    places = tl.minimum(tl.maximum(places, -SIDE), SIDE)
    bent = places * (BENT / SIDE)
    kept = bent / (1 - tl.abs(bent)) * root / factor
    words = ((levels - (top - LEVELS)).to(tl.int32) << 6) | (places.to(tl.int32) + (SIDE + 1))
    return words, (top.to(tl.int32) << 4) | fineness, kept


@jit(do_not_specialize=["seed", "counter", "tensor", "stream"])  # or 1 and every 16th would be kernels of their own
def _kernel(  # type: ignore[no-untyped-def]
    weight, residual, grad, words, grids, skipped, unscale, n,
    seed, counter, tensor, stream,
    lr, decay, eps, keep_m, add_m, keep_v, add_v, decode, encode, unbias_m, unbias_root, foresee, clamp,
    MODE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, FINEST: tl.constexpr,
    SIDE: tl.constexpr, BENT: tl.constexpr, FAINTEST: tl.constexpr, LIMIT: tl.constexpr,
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

    u, root = _decode_kernel(word.to(tl.int32) & 0xFFFF, grid, LEVELS, SIDE, BENT)
    m = u * root * (keep_m * decode) + g * add_m
    v = root * root * keep_v + g * g * add_v
    new_word, new_grid, kept = _encode_kernel(m, v, there, random, encode, LEVELS, FINEST, SIDE, BENT, FAINTEST)

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
    reach = tl.maximum(tl.abs(plain), LIMIT)
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
    "BLOCK": BLOCK, "LEVELS": LEVELS, "FINEST": FINEST, "SIDE": SIDE,
    "BENT": BENT, "FAINTEST": FAINTEST, "LIMIT": LIMIT,
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
