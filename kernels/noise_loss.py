"""Noise before the denoiser and loss after it, each in one pass, with nothing kept in between but addresses.

A diffusion objective is linear in latents and noise: noisy = a latents + b noise, target = c latents + d noise, with
coefficients of the timestep. `table` holds (a, b, c, d, weight) for every timestep, so epsilon, v and flow, with or
without min-SNR, are tables, not branches. Posterior and noise draws are functions of their address; the second pass
draws them again instead of reading them from memory.

    noisy = noisy_latents(mean, logvar, timesteps, table, address)
    total, rows = noise_loss(prediction, mean, logvar, timesteps, table, address, weights)

Both are PyTorch custom operations: torch.compile traces through them, CUDA graphs replay them with the address that
stands in its tensor at that time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import bits
from .launch import jit, launch, tl

POSTERIOR, NOISE = 0, 1  # streams
COLUMNS = 5  # of the table
SIZE = 256  # elements a program: more spill registers on sm_75 with Triton 3.7, on sm_86 to 90 with 3.6


@torch.library.custom_op("lowvram_db::noisy_latents", mutates_args=())
def noisy_latents(
    mean: Tensor, logvar: Tensor, timesteps: Tensor, table: Tensor, address: Tensor, triton: bool = False
) -> Tensor:
    """Sample the posterior and add noise: float32 [B, C, h, w].

    mean, logvar: of the latents' posterior, float32 [B, C, h, w]. timesteps: int64 [B]. table: float32 [T, 5].
    address: int64 [2], seed and step; row and element complete it. All on one device. triton: run the kernel, not its
    twin.
    """
    mean, logvar = mean.contiguous(), logvar.contiguous()
    if not triton:
        latents, noise = _draws(mean, logvar, address)
        a, b, *_ = _columns(table, timesteps)
        return a * latents + b * noise
    noisy = torch.empty_like(mean)
    size = mean[0].numel()
    launch(
        _noisy_kernel, (math.ceil(size / SIZE), len(mean)), mean, logvar, timesteps, table, address, noisy, size,
        POSTERIOR=POSTERIOR, NOISE=NOISE, COLUMNS=COLUMNS, SIZE=SIZE,
    )  # fmt: skip
    return noisy


@noisy_latents.register_fake
def _(mean, logvar, timesteps, table, address, triton=False):  # type: ignore[no-untyped-def]
    return torch.empty_like(mean, memory_format=torch.contiguous_format)


@torch.library.custom_op("lowvram_db::noise_loss", mutates_args=())
def _loss_and_gradient(
    prediction: Tensor,
    mean: Tensor,
    logvar: Tensor,
    timesteps: Tensor,
    table: Tensor,
    address: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As noise_loss; and the gradient of the total, float32 [B, C, h, w]."""
    prediction, mean, logvar = prediction.contiguous(), mean.contiguous(), logvar.contiguous()
    size = mean[0].numel()
    if not triton:
        latents, noise = _draws(mean, logvar, address)
        _, _, c, d, importance = _columns(table, timesteps)
        error = prediction.float() - (c * latents + d * noise)
        scale = importance if mask is None else importance * mask
        rows = (scale * error.square()).flatten(1).mean(1)
        gradient = (2 / size) * weights.view(-1, 1, 1, 1) * scale * error
        return (rows * weights).sum(), rows, gradient
    programs = math.ceil(size / SIZE)
    sums, gradient = mean.new_empty(len(mean), programs), torch.empty_like(mean)
    where = torch.ones(1, device=mean.device) if mask is None else mask.contiguous()
    launch(
        _loss_kernel, (programs, len(mean)),
        prediction, mean, logvar, timesteps, table, address, weights, where, sums, gradient, size, mean[0, 0].numel(),
        POSTERIOR=POSTERIOR, NOISE=NOISE, COLUMNS=COLUMNS, SIZE=SIZE, MASKED=mask is not None,
    )  # fmt: skip
    rows = sums.sum(1) / size
    return (rows * weights).sum(), rows, gradient


@_loss_and_gradient.register_fake
def _(prediction, mean, logvar, timesteps, table, address, weights, mask, triton):  # type: ignore[no-untyped-def]
    gradient = torch.empty_like(mean, memory_format=torch.contiguous_format)
    return mean.new_empty(()), mean.new_empty(len(mean)), gradient


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[2])
    ctx.dtype = inputs[0].dtype


def _backward(ctx, total, rows, gradient):  # type: ignore[no-untyped-def]
    (own,) = ctx.saved_tensors
    return ((own * total).to(ctx.dtype), *[None] * 8)


_loss_and_gradient.register_autograd(_backward, setup_context=_keep)


def noise_loss(
    prediction: Tensor,
    mean: Tensor,
    logvar: Tensor,
    timesteps: Tensor,
    table: Tensor,
    address: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    """The weighted squared error of a prediction: (total, rows).

    prediction: [B, C, h, w], any float dtype; the error is taken in float32. weights: float32 [B]; 1 / instances for
    rows of the subject, lambda / (class rows) for rows of the class. mask: float32 [B, 1, h, w] or None, multiplies
    the squared error. The rest as for noisy_latents.
    total: sum of weights * rows, differentiable in the prediction. rows: float32 [B], each row's mean error, times the
    table's weight; for the record, without a gradient.
    """
    total, rows, _ = _loss_and_gradient(prediction, mean, logvar, timesteps, table, address, weights, mask, triton)
    return total, rows.detach()


def _columns(table: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
    """The coefficients of every row, COLUMNS times [B, 1, 1, 1]."""
    return table[timesteps].view(-1, COLUMNS, 1, 1, 1).unbind(1)


def _draws(mean: Tensor, logvar: Tensor, address: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and noise [B, C, h, w], each row's from its own address."""
    seed, step = address.tolist()

    def normal(stream: int) -> Tensor:
        draws = [bits.normal(tuple(mean.shape[1:]), seed, step=step, sample=b, stream=stream) for b in range(len(mean))]
        return torch.stack(draws).to(mean.device)

    return mean + torch.exp(0.5 * logvar) * normal(POSTERIOR), normal(NOISE)


@jit
def _normal_kernel(place, seed, step, row, stream):  # type: ignore[no-untyped-def]
    """As bits.normal."""
    w0, w1, _, _ = tl.philox(seed, place.to(tl.uint32), step.to(tl.uint32), row, stream)
    normal, _ = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(w0), tl.uint_to_uniform_float(w1))
    return normal


@jit
def _latents_and_noise_kernel(  # type: ignore[no-untyped-def]
    mean, logvar, address, size, place, there, POSTERIOR: tl.constexpr, NOISE: tl.constexpr
):
    """As _draws, for one program's elements of one row."""
    row = tl.program_id(1)
    seed, step = tl.load(address), tl.load(address + 1)
    spread = tl.exp(0.5 * tl.load(logvar + row * size + place, there, 0.0))
    draw = _normal_kernel(place, seed, step, row, POSTERIOR)
    latents = tl.load(mean + row * size + place, there, 0.0) + spread * draw
    return latents, _normal_kernel(place, seed, step, row, NOISE)


@jit
def _noisy_kernel(  # type: ignore[no-untyped-def]
    mean, logvar, timesteps, table, address, noisy, size,
    POSTERIOR: tl.constexpr, NOISE: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = place < size
    latents, noise = _latents_and_noise_kernel(mean, logvar, address, size, place, there, POSTERIOR, NOISE)
    coefficients = table + tl.load(timesteps + row) * COLUMNS
    result = tl.load(coefficients) * latents + tl.load(coefficients + 1) * noise
    tl.store(noisy + row * size + place, result, there)


@jit
def _loss_kernel(  # type: ignore[no-untyped-def]
    prediction, mean, logvar, timesteps, table, address, weights, mask, sums, gradient, size, plane,
    POSTERIOR: tl.constexpr, NOISE: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = place < size
    latents, noise = _latents_and_noise_kernel(mean, logvar, address, size, place, there, POSTERIOR, NOISE)
    coefficients = table + tl.load(timesteps + row) * COLUMNS
    target = tl.load(coefficients + 2) * latents + tl.load(coefficients + 3) * noise
    error = tl.load(prediction + row * size + place, there, 0.0).to(tl.float32) - target
    scale = tl.load(coefficients + 4)
    if MASKED:
        scale = scale * tl.load(mask + row * plane + place % plane, there, 0.0)
    squares = tl.where(there, scale * error * error, 0.0)
    tl.store(sums + row * tl.num_programs(0) + tl.program_id(0), tl.sum(squares, 0))
    slope = 2.0 / size * tl.load(weights + row) * scale * error
    tl.store(gradient + row * size + place, slope, there)
