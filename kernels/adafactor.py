"""Adafactor without momentum: the second moment of a matrix from the sums of its rows and columns, next to no state.

Source: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018, algorithms 4 and 5, with
the learning rate as it is given instead of relative to the weights' size. As torch.optim.Adafactor computes it; but a
convolution's weight is one matrix, [out, in * height * width], where that one factors every 3 by 3 by itself and so
keeps two thirds of the state it is there to save.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import bits, native
from .adam8 import SEED, SKIPPED, STEP, TENSOR
from .launch import Implementation, constant, jit, launch, tl
from .storage import float32, mode_of, narrow, narrow_kernel, pattern, widen, widen_kernel

EPS = 1e-15  # squared, the least second moment
LIMIT = 1.0  # an update's root mean square, in units of lr, is no larger
CHUNK = 2**22  # elements whose float32 copies there are at once
_ELEMENTS = 1024  # of a program of the kernel


class Step(NamedTuple):
    """The numbers of one optimizer step, the same for every weight of a parameter group."""

    lr: float
    decay: float  # 1 - lr * weight_decay
    mix: float  # the new squares' share in the second moment, t^-0.8


def step_numbers(step: int, *, lr: float, weight_decay: float) -> Step:
    """Of optimizer step 1, 2, ..."""
    return Step(lr, 1 - lr * weight_decay, step**-0.8)


def update_(
    weight: Tensor,
    residual: Tensor | None,
    grad: Tensor,
    rows: Tensor,
    columns: Tensor,
    unscale: Tensor,
    numbers: Tensor,
    record: Tensor,
    stream: int,
    kernels: Implementation,
) -> None:
    """One Adafactor step in place.

    weight: [rows, columns]: bf16 (with `residual`, int8 of its shape: 24 bits together), fp16 or float32. grad: of its
    shape, any of these. rows, columns: float32 [rows], [columns], means of the squares; both begin as zeros. unscale:
    float32 [1], multiplies the gradient. numbers: float32 [3], a Step. record, stream: as adam8's; what was skipped
    grows by 1 where a gradient is not finite: then nothing changes. All contiguous and on one device.
    """
    if isinstance(weight, FakeTensor):  # there is nothing to compute; a trace sees what a chunk takes
        torch.empty(3 * min(weight.numel(), CHUNK), dtype=torch.float32)
        return
    lr, decay, mix = numbers.unbind()
    row_squares = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float32).mul_(unscale).square_() / grad.shape[1]
    column_squares = torch.linalg.vector_norm(grad, dim=0, dtype=torch.float32).mul_(unscale).square_() / grad.shape[0]
    finite = torch.isfinite(row_squares.sum() + column_squares.sum())
    new_rows = torch.where(finite, torch.lerp(rows, row_squares, mix), rows)
    new_columns = torch.where(finite, torch.lerp(columns, column_squares, mix), columns)

    ratios = new_rows / new_rows.mean().clamp(min=EPS)  # the second moment is ratios * columns
    size = max(1, CHUNK // grad.shape[1])
    parts = [slice(first, first + size) for first in range(0, len(grad), size)]
    squares = [_directions(grad[part], ratios[part], new_columns, unscale).square_().sum() for part in parts]
    length = torch.stack(squares).sum().div_(weight.numel()).sqrt_() / LIMIT
    factor = torch.where(finite, lr / length.clamp(min=1.0), math.nan)

    # Only here anything changes: should the memory not suffice before, the step can be repeated.
    record[SKIPPED] += ~finite
    rows.copy_(new_rows)
    columns.copy_(new_columns)
    if kernels == "triton":
        _launch(weight, residual, grad, ratios, columns, unscale, factor, decay, record, stream)
        return
    for part in parts:
        move = _directions(grad[part], ratios[part], columns, unscale).mul_(factor)
        rest = None if residual is None else residual[part]
        _apply(weight[part], rest, move, decay, record, stream, part.start * grad.shape[1], kernels)


def _directions(grad: Tensor, ratios: Tensor, columns: Tensor, unscale: Tensor) -> Tensor:
    """Gradients over the roots of their second moments, float32."""
    return torch.outer(ratios, columns).clamp_(min=EPS * EPS).rsqrt_().mul_(grad).mul_(unscale)


def _apply(
    weight: Tensor,
    residual: Tensor | None,
    move: Tensor,
    decay: Tensor,
    record: Tensor,
    stream: int,
    first: int,
    kernels: Implementation,
) -> None:
    """weight <- weight * decay - move, rounded stochastically; as it was where `move` is no number. first: the number
    of its first element."""
    flat, rest = weight.view(-1), None if residual is None else residual.view(-1)
    old = widen(flat, rest)
    new = old * decay - move.view(-1)
    new = torch.where(new == new, new, old)
    if weight.dtype == torch.float32:
        flat.copy_(new)
        return
    groups = range(first // 8, (first + len(old) + 7) // 8)
    if kernels == "native" and native.works():
        random = native.lanes(groups, record, stream)
    else:
        places = torch.arange(groups.start, groups.stop, device=weight.device)
        random = bits.lanes(places, record[SEED], record[STEP], record[TENSOR], stream).flatten()
    narrow(new, random[first % 8 :][: len(old)], flat, rest)


_EPS, _SIZE = constant(EPS * EPS), constant(_ELEMENTS)
_SEED, _STEP, _TENSOR = constant(SEED), constant(STEP), constant(TENSOR)


@jit
def _kernel(  # type: ignore[no-untyped-def]
    weight, residual, grad, ratios, columns, unscale, factor, decay, record, n, width,
    STREAM: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """As _directions and _apply. MODE: the storage of weights, see storage.py."""
    first = tl.program_id(0).to(tl.int64) * _SIZE
    place = first + tl.arange(0, _SIZE)[None, :]
    there = place < n
    groups = first // 8 + tl.arange(0, _SIZE // 8)[None, :]
    step, tensor = tl.load(record + _STEP).to(tl.uint32), tl.load(record + _TENSOR).to(tl.uint32)
    random = bits.lanes_kernel(groups, tl.load(record + _SEED), step, tensor, STREAM)
    g = float32(tl.load(grad + place, there, 0)) * tl.load(unscale)
    v = tl.load(ratios + place // width, there, 1.0) * tl.load(columns + place % width, there, 1.0)
    move = g * tl.rsqrt(tl.maximum(v, _EPS)) * tl.load(factor)
    w = widen_kernel(weight, residual, place, there, MODE)
    w = w * tl.load(decay) - move
    narrow_kernel(w, random, weight, residual, place, there & (w == w), MODE)


def _launch(
    weight: Tensor,
    residual: Tensor | None,
    grad: Tensor,
    ratios: Tensor,
    columns: Tensor,
    unscale: Tensor,
    factor: Tensor,
    decay: Tensor,
    record: Tensor,
    stream: int,
) -> None:
    n = weight.numel()
    launch(
        _kernel, (math.ceil(n / _ELEMENTS),),
        pattern(weight), residual, pattern(grad), ratios, columns, unscale, factor, decay, record, n, grad.shape[1],
        STREAM=stream, MODE=mode_of(weight, residual),
    )  # fmt: skip
