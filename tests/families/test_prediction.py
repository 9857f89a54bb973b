from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowvram_db.families import open_model
from lowvram_db.families.prediction import Picture, errors, spoken_instead
from lowvram_db.families.schedule import read_schedule

KINDS = ("epsilon", "v_prediction")


class Knowing:
    """A family whose denoiser predicts rightly what `speaks` says but for an error, relative to the target's size."""

    def __init__(self, folder, speaks, error):
        self.noise_schedule = read_schedule(folder)
        self.speaks, self.error, self.picture = speaks, error, None

    def denoise(self, denoiser, latents, timesteps, conditioning):
        signal, spread = (part.sqrt() for part in (self.alpha(timesteps), 1 - self.alpha(timesteps)))
        noise = (latents - signal * self.picture) / spread
        target = noise if self.speaks == "epsilon" else signal * noise - spread * self.picture
        return target + self.error * target.std() * torch.randn(
            target.shape, generator=torch.Generator().manual_seed(1)
        )

    def alpha(self, timesteps):
        return self.noise_schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)


@pytest.mark.parametrize("said", KINDS)
@pytest.mark.parametrize("speaks", KINDS)
@pytest.mark.parametrize("error", [0.0, 0.5, 0.7])
def test_trained_weights_are_told_by_their_errors(miniature, speaks, said, error):
    family = Knowing(miniature, speaks, error)
    family.picture = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    read = errors(family, nn.Linear(1, 1), [Picture(family.picture, {})], torch.float32)
    assert read[speaks] == pytest.approx(error**2, abs=0.05)
    assert spoken_instead(read, said) == (None if speaks == said else speaks)


@pytest.mark.parametrize("said", KINDS)
def test_weights_that_know_nothing_tell_nothing(family, said):
    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    read = errors(family, family.load_denoiser(), [Picture(picture, {"text": torch.zeros(1, 77, 32)})], torch.float32)
    assert spoken_instead(read, said) is None


@pytest.mark.parametrize("said", KINDS)
def test_weights_that_give_no_numbers_tell_nothing(miniature, said):
    silent = SimpleNamespace(
        noise_schedule=open_model(str(miniature)).noise_schedule,
        denoise=lambda _, latents, *__: torch.full_like(latents, torch.nan),
    )
    read = errors(silent, nn.Linear(1, 1), [Picture(torch.ones(1, 4, 8, 8), {})], torch.float32)
    assert spoken_instead(read, said) is None
