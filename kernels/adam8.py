"""AdamW with two moments in 16 bits, one kernel a tensor: read the gradient, dequantize, step, quantize, round, write.
In PyTorch's operations, which say what it means; in Triton for GPUs; in C++ (adam8.cpp) for CPUs.

How the moments are kept is moment_code.py's. An error made in rounding m would go on moving the weight for
1 / (1 - beta1) steps; its whole future effect is known at once and is taken off the update at once (docs/adam8.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import bits, native
from .adam8_step import Step
from .approximate import reciprocal
from .launch import Implementation, constant, jit, launch, tl
from .moment_code import BLOCK, dequantize, dequantize_kernel, quantize, quantize_kernel
from .storage import flat, float32, mode_of, narrow, narrow_kernel, pattern, widen, widen_kernel

LIMIT = 1.5  # an update is no larger than this or, where that is more, than
TRUST = 0.9  # of what the moments say: such updates are rare in Adam, and most of them here are a code's error
ROWS = 4  # blocks a program of the kernel: one for every warp
REGISTERS = 80  # a thread of it may hold: 24 warps are at home on a multiprocessor then, and none has to spill
CHUNK = 2**16  # elements the twin works on at once on a CPU: they stay in a core's cache
GPU_CHUNK = 2**24  # and on a GPU, where each of its 300 operations on a chunk is a launch: 90,000 a step of SD 1.5
TWIN_BYTES = 76  # an element, of what the twin holds beside its arguments while it works on a chunk


SEED, STEP, TENSOR, SKIPPED = range(4)  # the places in a tensor's record: see update_


def zero_state(n: int, device: torch.device) -> dict[str, Tensor]:
    """The state of a tensor of n weights before its first step."""
    blocks = math.ceil(n / BLOCK)
    return {
        "codes": torch.zeros(n, dtype=torch.int16, device=device),
        "scales": torch.zeros(blocks, dtype=torch.int32, device=device),
    }


def new_weights(w: Tensor, m: Tensor, v: Tensor, error: Tensor, step: Step) -> Tensor:
    """The AdamW update, from the exact moments and what the state will hold more of m. All float32, any shape."""
    inverse = 1 / (torch.sqrt(v) + step.root_eps)
    m = m * step.moves
    reach = ((m * inverse).abs() * TRUST).clamp(min=LIMIT)
    update = (m - error * step.foresee) * inverse
    return w * step.decay - torch.minimum(torch.maximum(update, -reach), reach) * step.lr


def update_(
    weight: Tensor,
    residual: Tensor | None,
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    unscale: Tensor,
    numbers: Tensor,
    record: Tensor,
    stream: int,
    kernels: Implementation,
) -> None:
    """One AdamW step in place.

    weight: bf16 (with `residual`, int8 [n]: 24 bits together), fp16 or float32. grad: any of these. Both dense, of n
    elements that count in the order of memory, which is the same for both.
    codes: int16 [n] and scales: int32 [ceil(n / 256)], the state, of which nothing stays where keep_scaled and keep_v
    are 0. unscale: float32 [1], multiplies the gradient; where it is NaN the whole tensor is left as it was. numbers:
    float32 [12], a Step. record: int64 [4], the seed, the step and the tensor's number, which with `stream` and an
    element's place are the address of its rounding bits; and a count that grows by the blocks left as they were because
    a gradient in them was not finite. All on one device, where they are read when the kernel runs, and not before: a
    captured launch finds there the step it is replayed in.
    """
    if isinstance(weight, FakeTensor):  # there is nothing to compute, and the kernel needs no memory but its arguments
        return
    if steps_at_once(kernels):
        run = _launch if kernels == "triton" else native.step
        run(weight, residual, grad, codes, scales, unscale, numbers, record, stream)
        return
    weight, grad, size = flat(weight), flat(grad), chunk_of(weight.device)
    for first in range(0, len(weight), size):
        chunk = slice(first, first + size)
        blocks = slice(first // BLOCK, (first + size) // BLOCK)
        rest = None if residual is None else residual[chunk]
        state = codes[chunk], scales[blocks]
        _twin(weight[chunk], rest, grad[chunk], *state, unscale, numbers, record, stream, first // 8)


def steps_at_once(kernels: Implementation) -> bool:
    """Whether a step of a tensor needs no memory that it might not get halfway."""
    return kernels == "triton" or (kernels == "native" and native.works())


def chunk_of(device: torch.device) -> int:
    """Elements the twin works on at once."""
    return CHUNK if device.type == "cpu" else GPU_CHUNK


def _twin(
    weight: Tensor,
    residual: Tensor | None,
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    unscale: Tensor,
    numbers: Tensor,
    record: Tensor,
    stream: int,
    first_group: int,
) -> None:
    """One chunk of update_: the kernel's meaning."""
    n = len(weight)
    w, g = _blocks(widen(weight, residual)), _blocks(grad.float())
    present = _blocks(torch.ones(n, dtype=torch.bool, device=weight.device))
    groups = torch.arange(first_group, first_group + w.numel() // 8, device=weight.device)
    random = bits.lanes(groups, record[SEED], record[STEP], record[TENSOR], stream).view_as(w)
    w, new_codes, new_scales, finite = _advance(
        w, g, _blocks(codes).int(), scales.unsqueeze(1), random, present, unscale, numbers
    )
    record[SKIPPED] += (~finite).sum()
    scales.copy_(new_scales.squeeze(1))
    codes.copy_(new_codes.flatten()[:n])
    narrow(w.flatten()[:n], random.flatten()[:n], weight, residual)


def _advance(
    w: Tensor,
    g: Tensor,
    codes: Tensor,
    scales: Tensor,
    random: Tensor,
    present: Tensor,
    unscale: Tensor,
    numbers: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of whole blocks: new weights, codes (int32) and scales, and which blocks could be stepped, bool."""
    step = Step(*numbers.unbind())  # type: ignore[arg-type]  # scalar tensors, which do as numbers do
    g = g * unscale
    u, root = dequantize(codes, scales)
    m = u * root * step.keep_scaled + g * step.add_scaled
    v = root * root * step.keep_v + g * g * step.add_v
    new_codes, new_scales, error = quantize(m, v, present, random)
    new_w = new_weights(w, m, v, error, step)
    finite = v.amax(1, keepdim=True) < math.inf  # a NaN is the largest of all
    return new_w.where(finite, w), new_codes.where(finite, codes), new_scales.where(finite, scales), finite


def _blocks(flat: Tensor) -> Tensor:
    """[n] -> [blocks, 256], filled up with zeros."""
    if len(flat) % BLOCK == 0:
        return flat.view(-1, BLOCK)
    return torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


_LIMIT, _TRUST, _BLOCK, _ROWS = constant(LIMIT), constant(TRUST), constant(BLOCK), constant(ROWS)
_SEED, _STEP, _TENSOR, _SKIPPED = constant(SEED), constant(STEP), constant(TENSOR), constant(SKIPPED)
_LR, _DECAY, _ROOT_EPS, _KEEP_SCALED, _ADD_SCALED, _KEEP_V, _ADD_V, _MOVES, _FORESEE = (
    constant(Step._fields.index(name))
    for name in ["lr", "decay", "root_eps", "keep_scaled", "add_scaled", "keep_v", "add_v", "moves", "foresee"]
)


@jit
def _limited(x, reach):  # type: ignore[no-untyped-def]
    """x between -reach and reach, in one instruction less than by a minimum and a maximum."""
    return bits.as_float(bits.as_bits(tl.minimum(tl.abs(x), reach)) | (bits.as_bits(x) & -0x80000000))


@jit
def _kernel(  # type: ignore[no-untyped-def]
    weight, residual, grad, codes, scales, unscale, numbers, record, n,
    STREAM: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """As _twin, ROWS blocks a program. MODE: the storage of weights, see storage.py."""
    row = tl.program_id(0).to(tl.int64) * _ROWS + tl.arange(0, _ROWS)[:, None]
    place = row * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    there = place < n
    here = row * _BLOCK < n
    g = float32(tl.load(grad + place, there, 0)) * tl.load(unscale)
    code = tl.load(codes + place, there, 0)
    scale = tl.load(scales + row, here, 0)
    groups = row * (_BLOCK // 8) + tl.arange(0, _BLOCK // 8)[None, :]
    step, tensor = tl.load(record + _STEP).to(tl.uint32), tl.load(record + _TENSOR).to(tl.uint32)
    random = bits.lanes_kernel(groups, tl.load(record + _SEED), step, tensor, STREAM)

    u, root = dequantize_kernel(code.to(tl.int32) & 0xFFFF, scale)
    m = u * root * tl.load(numbers + _KEEP_SCALED) + g * tl.load(numbers + _ADD_SCALED)
    v = root * root * tl.load(numbers + _KEEP_V) + g * g * tl.load(numbers + _ADD_V)
    new_code, new_scale, error, finite = quantize_kernel(m, tl.where(there, v, 0.0), random)

    # update
    w = widen_kernel(weight, residual, place, there, MODE)
    inverse = reciprocal(tl.sqrt(v) + tl.load(numbers + _ROOT_EPS))
    m = m * tl.load(numbers + _MOVES)
    reach = tl.maximum(tl.abs(m * inverse) * _TRUST, _LIMIT)
    update = _limited((m - error * tl.load(numbers + _FORESEE)) * inverse, reach)
    w = w * tl.load(numbers + _DECAY) - update * tl.load(numbers + _LR)

    # write, unless a gradient of the block is not finite
    tl.atomic_add(record + _SKIPPED + row * 0, 1, ~finite, sem="relaxed")
    tl.store(codes + place, new_code.to(tl.int16), there & finite)
    tl.store(scales + row, tl.where(finite, new_scale, scale), here)
    narrow_kernel(w, random, weight, residual, place, there & finite, MODE)


def _launch(
    weight: Tensor,
    residual: Tensor | None,
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    unscale: Tensor,
    numbers: Tensor,
    record: Tensor,
    stream: int,
) -> None:
    n = weight.numel()
    launch(
        _kernel, (math.ceil(n / (ROWS * BLOCK)),),
        pattern(weight), residual, pattern(grad), codes, scales, unscale, numbers, record, n,
        STREAM=stream, MODE=mode_of(weight, residual), maxnreg=REGISTERS,
    )  # fmt: skip
