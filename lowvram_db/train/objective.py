"""The DreamBooth loss: noise prediction on the subject, plus lambda times noise prediction on the class.

Every draw is a function of (seed, step, sample, stream); `sample` numbers the rows of a step's batch.
Sources: Ho et al. 2020 (epsilon), Salimans & Ho 2022 (v), Ruiz et al. 2023 (prior preservation), Hang et al. 2023
(min-SNR).
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_db.families.base import Moments, NoiseSchedule
from lowvram_db.kernels import bits


class Stream(IntEnum):
    """What a random draw is for; draws of different streams share no bits."""

    POSTERIOR = 0
    NOISE = 1
    TIMESTEP = 2
    INSTANCE_ORDER = 3
    CLASS_ORDER = 4
    PROMPT = 5


class Draws(NamedTuple):
    """The random part of one step."""

    posterior: Tensor  # float32 [B, C, h, w], standard normal
    noise: Tensor  # float32 [B, C, h, w], standard normal
    timesteps: Tensor  # int64 [B]


def draw(shape: tuple[int, ...], train_timesteps: int, seed: int, step: int) -> Draws:
    """The draws of one step for latents of `shape` = (B, C, h, w), on the CPU."""
    rows = range(shape[0])

    def normal(stream: Stream) -> Tensor:
        return torch.stack([bits.normal(shape[1:], seed, step=step, sample=row, stream=stream) for row in rows])

    timesteps = [bits.integer(train_timesteps, seed, step=step, sample=row, stream=Stream.TIMESTEP) for row in rows]
    return Draws(normal(Stream.POSTERIOR), normal(Stream.NOISE), torch.tensor(timesteps))


def sample_posterior(moments: Moments, normal: Tensor) -> Tensor:
    """Moments and standard normal noise, all [B, C, h, w] -> latents."""
    return moments.mean + torch.exp(0.5 * moments.logvar) * normal


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise, row by row."""
    signal, spread = _coefficients(timesteps, schedule)
    return signal * latents + spread * noise


def target(latents: Tensor, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """What the denoiser should predict: the noise, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x."""
    if schedule.prediction_type == "epsilon":
        return noise
    signal, spread = _coefficients(timesteps, schedule)
    return signal * noise - spread * latents


def min_snr_weights(timesteps: Tensor, schedule: NoiseSchedule, gamma: float) -> Tensor:
    """Loss weight of each row, float32 [B]: min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v."""
    alpha_bar = schedule.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha_bar / (1 - alpha_bar)
    if schedule.prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)  # the same, and 1 where the SNR is zero
    return snr.clamp(max=gamma) / (snr + 1)


class Loss(NamedTuple):
    """Scalars, float32."""

    total: Tensor
    instance: Tensor
    prior: Tensor  # zero where the batch has no class images


def loss(prediction: Tensor, wanted: Tensor, weights: Tensor | None, instances: int, prior_weight: float) -> Loss:
    """mean over instance rows + prior_weight * mean over prior rows of each row's weighted mean squared error.

    prediction, wanted: [B, C, h, w], the first `instances` rows of the subject and the rest of the class; computed in
    float32. weights: float32 [B] or None.
    """
    per_row = (prediction.float() - wanted.float()).square().flatten(1).mean(1)
    if weights is not None:
        per_row = per_row * weights
    instance = per_row[:instances].mean()
    prior = per_row[instances:].mean() if len(per_row) > instances else torch.zeros_like(instance)
    return Loss(instance + prior_weight * prior, instance, prior)


def _coefficients(timesteps: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    alpha_bar = schedule.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
