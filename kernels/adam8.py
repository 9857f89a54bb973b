"""AdamW with two moments in 16 bits, one kernel a tensor: read the gradient, decode, update, encode, round, write.

How the moments are kept is moment_code.py's. An error made in rounding m would go on moving the weight for
1 / (1 - beta1) steps; its whole future effect is known at once and is taken off the update at once (docs/adam8.md).
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
from .moment_code import BLOCK, decode, decode_kernel, encode, encode_kernel
from .moment_code import CONSTANTS as CODE

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


# Or 1 and every 16th, and every fourth tensor's count of what it skipped, would be kernels of their own.
@jit(do_not_specialize=["seed", "counter", "tensor", "stream"], do_not_specialize_on_alignment=["skipped"])
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

    u, root = decode_kernel(word.to(tl.int32) & 0xFFFF, grid, MIDDLE, NARROW, COARSEST, LEVELS, HALF, FULL)
    m = u * root * (keep_m * decode) + g * add_m
    v = root * root * keep_v + g * g * add_v
    new_word, new_grid, kept = encode_kernel(
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
CONSTANTS = {"BLOCK": BLOCK, "LIMIT": LIMIT, "TRUST": TRUST, **CODE}


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
