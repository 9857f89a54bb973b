"""The DreamBooth objective: noise prediction on the subject, plus lambda times noise prediction on the class.

Everything that depends on the timestep stands in one table, which the kernels of kernels/noise_loss.py read. Every draw
is a function of (seed, step, sample, stream); `sample` numbers the rows of a step's batch.
Sources: Ho et al. 2020 (epsilon), Salimans & Ho 2022 (v), Ruiz et al. 2023 (prior preservation), Hang et al. 2023
(min-SNR).
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_db import framing
from lowvram_db.families.base import NoiseSchedule
from lowvram_db.kernels import bits, noise_loss


class Stream(IntEnum):
    """What a random draw is for; draws of different streams share no bits."""

    POSTERIOR = noise_loss.POSTERIOR
    NOISE = noise_loss.NOISE
    TIMESTEP = 2
    INSTANCE_ORDER = 3
    CLASS_ORDER = 4
    PROMPT = 5
    AUGMENT = framing.AUGMENT
    VARIANT = 7
    BUCKET = 8
    DROPOUT = 9


def timesteps(rows: int, train_timesteps: int, seed: int, step: int) -> Tensor:
    """Each row's timestep, int64 [rows], on the CPU."""
    return torch.tensor(
        [bits.integer(train_timesteps, seed, step=step, sample=row, stream=Stream.TIMESTEP) for row in range(rows)]
    )


def table(schedule: NoiseSchedule, min_snr_gamma: float | None = None) -> Tensor:
    """For every timestep, float32 [T, 5]: a and b of noisy = a latents + b noise, c and d of target = c latents + d
    noise, and the loss weight.

    The target is the noise, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) latents. The weight is 1, or min(SNR,
    gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v.
    """
    alpha_bar = schedule.alphas_cumprod
    signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    predicts_noise = schedule.prediction_type == "epsilon"
    target = (torch.zeros_like(signal), torch.ones_like(signal)) if predicts_noise else (-spread, signal)
    weight = torch.ones_like(signal)
    if min_snr_gamma is not None:
        snr = alpha_bar / (1 - alpha_bar)
        # For epsilon the same as the formula above, and 1 where the SNR is zero.
        weight = (min_snr_gamma / snr).clamp(max=1.0) if predicts_noise else snr.clamp(max=min_snr_gamma) / (snr + 1)
    return torch.stack([signal, spread, *target, weight], 1)


def row_weights(rows: int, instances: int, prior_weight: float) -> Tensor:
    """What makes a sum over rows the mean over the subject's rows plus prior_weight times the mean over the class's."""
    weights = torch.full((rows,), 1 / instances)
    if rows > instances:
        weights[instances:] = prior_weight / (rows - instances)
    return weights


class Loss(NamedTuple):
    """Scalars, float32."""

    total: Tensor
    instance: Tensor
    prior: Tensor  # without lambda; zero where the batch has no class images


def mean(losses: list[Loss]) -> Loss:
    """Of all batches of a step."""
    return Loss(*(torch.stack(part).mean() for part in zip(*losses, strict=True)))


def split(total: Tensor, rows: Tensor, instances: int) -> Loss:
    """The loss and its two terms, from the loss of every row [B], the first `instances` rows the subject's."""
    prior = rows[instances:].mean() if len(rows) > instances else torch.zeros_like(total)
    return Loss(total, rows[:instances].mean(), prior.detach())
