"""Which prediction a denoiser's weights speak: noise or v. A scheduler's config may say it wrongly, and then training
drives the weights to what they never learned, and every picture is noise."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowvram_db.families.base import Family
from lowvram_db.families.conditioning import Conditioning, brought

_TIMES = (0.4, 0.5, 0.6, 0.7)  # of the schedule: where noise and v differ, and the picture is still to be guessed
# Of a trained denoiser's prediction, read rightly, less than the one is wrong, and read wrongly, more than the other.
_WRONG_AT_MOST, _WRONG_AT_LEAST = 0.6, 0.9


class Picture(NamedTuple):
    """A picture as the denoiser knows it."""

    mean: Tensor  # latents, float32 [1, C, h, w]
    conditioning: Conditioning  # [1, ...] each


@torch.no_grad()
def errors(family: Family, denoiser: Any, pictures: Sequence[Picture], dtype: torch.dtype) -> dict[str, float]:
    """Mean squared error of what a denoiser predicts, read as each kind of prediction; that of predicting nothing is 1.

    denoiser: on its device, taking `dtype`.
    """
    device, alphas = next(denoiser.parameters()).device, family.noise_schedule.alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    sums = {"epsilon": 0.0, "v_prediction": 0.0}
    for time, (mean, told) in zip(_TIMES, cycle(pictures), strict=False):
        timestep = int(time * len(alphas))
        signal, spread = alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()
        noise = torch.randn(mean.shape, generator=generator)
        noisy = (signal * mean + spread * noise).to(device, dtype)
        timesteps = torch.tensor([timestep], device=device)
        prediction = family.denoise(denoiser, noisy, timesteps, brought(told, device, dtype)).float().cpu()
        targets = {"epsilon": noise, "v_prediction": signal * noise - spread * mean}
        for kind, target in targets.items():
            error = (prediction - target).square().mean() / target.square().mean()
            sums[kind] += error.item() / len(_TIMES)
    return sums


def spoken_instead(read: dict[str, float], said: str) -> str | None:
    """The prediction that the weights speak where it is another one than is said; None where errors do not tell."""
    (other,) = read.keys() - {said}
    return other if read[other] <= _WRONG_AT_MOST and read[said] >= _WRONG_AT_LEAST else None
