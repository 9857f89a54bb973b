"""The same training step by different recipes, on random weights of a model's true shape.

`Ours` is this project's own step, under any strategy; `Classic` is what people do without it: fp32 weights, autocast,
bitsandbytes' AdamW8bit, gradient checkpointing, SDPA, gradients set to None, as lean as it can be written. Both get
the same latents and conditioning, and neither holds a VAE or a text encoder.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F
from usage import peaks, reset_peaks, settle

from lowvram_db.config import Config
from lowvram_db.families import open_blank
from lowvram_db.families.base import Moments
from lowvram_db.families.blank import Blank
from lowvram_db.families.conditioning import Conditioning, brought, collated, rows_of
from lowvram_db.formats.source import find_configs
from lowvram_db.framing import View
from lowvram_db.kernels.launch import implementation
from lowvram_db.memory.attention import use_attention
from lowvram_db.memory.device import compute_dtype
from lowvram_db.optim.storage import narrowing
from lowvram_db.train.batches import Batch
from lowvram_db.train.learner import Learner, Surroundings
from lowvram_db.train.strategy import Event, Strategy

LR = 2e-6


@dataclass(frozen=True)
class Work:
    """What is trained on: `batch` photos and, with prior, as many class images a step, square, `resolution` px."""

    model: str  # hub id of a well-known model, or a folder; only its config files are read
    resolution: int = 512
    batch: int = 1
    prior: bool = True
    compute: str = "bf16"
    attention: str = "auto"
    seed: int = 0

    @property
    def rows(self) -> int:
        return self.batch * (2 if self.prior else 1)

    def config(self, **sections: dict[str, Any]) -> Config:
        """As a run's TOML would have it, with what `sections` add."""
        own: dict[str, Any] = {
            "model": {"name": self.model},
            "subject": {"photos": "photos", "identifier": "ohwx", "class": "dog"},
            "prior": {"enabled": self.prior},
            "train": {"resolution": self.resolution, "batch": self.batch, "lr": LR, "seed": self.seed},
            "precision": {"compute": self.compute},
        }
        for section, values in sections.items():
            own[section] = own.get(section, {}) | values
        return Config.model_validate({**own, "attention": self.attention})

    def family(self) -> Blank:
        return open_blank(find_configs(self.model))

    def moments(self, family: Blank) -> Moments:
        """Random posteriors, float32 [rows, C, h, w]."""
        side = self.resolution // family.latent_side
        shape = (self.rows, family.latent_channels, side, side)
        generator = torch.Generator().manual_seed(self.seed)
        return Moments(torch.randn(shape, generator=generator), torch.full(shape, -6.0))

    def text(self, family: Blank) -> Conditioning:
        """Random, float32 [rows, ...] by name."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        shapes = family.text_shapes.items()
        return {name: torch.randn(self.rows, *shape, generator=generator) for name, shape in shapes}

    @property
    def views(self) -> list[View]:
        return [View.of((self.resolution,) * 2, (self.resolution,) * 2)] * self.rows


class Recipe(Protocol):
    """A way to train."""

    def step(self) -> None: ...


class Ours:
    """adam8 stepping inside backward into bf16 weights, or what `sections` of the config say."""

    def __init__(
        self,
        work: Work,
        device: torch.device,
        strategy: Strategy | None = None,
        order: Sequence[Event] = (),
        **sections: Any,
    ) -> None:
        config, family = work.config(**sections), work.family()
        network = random_denoiser(family, narrowing(config.weights))
        strategy = strategy or everywhere(family)
        kernels = implementation(config.kernels, device)
        text, most = work.text(family), len(family.noise_schedule.alphas_cumprod)

        def timesteps(rows: int, batch_number: int) -> Tensor:
            return torch.randint(0, most, (rows,), generator=torch.Generator().manual_seed(batch_number))

        surroundings = Surroundings(
            device,
            compute_dtype(work.compute, device),
            timesteps,
            lambda prompts: rows_of(text, slice(len(prompts))),
        )
        self.learner = Learner(config, family, {family.denoiser_part: network}, surroundings, strategy, kernels, order)
        use_attention(self.learner.denoiser, config.attention, device, self.learner.dtype)
        self._batch = Batch(work.moments(family), work.views, [""] * work.rows, work.batch)

    def step(self) -> None:
        loss = self.learner.backward(self._batch)
        self.learner.update(loss.total)
        self.learner.scaler.update()
        self.learner.step += 1


class Classic:
    """fp32 weights and gradients, autocast, bitsandbytes' AdamW8bit, gradient checkpointing."""

    def __init__(self, work: Work, device: torch.device) -> None:
        from bitsandbytes.optim import AdamW8bit

        family = work.family()
        self._family, self._device, self._work = family, device, work
        self._dtype = compute_dtype(work.compute, device)
        self._unet = random_denoiser(family, lambda weight: weight).to(device).train()
        self._unet.enable_gradient_checkpointing()
        use_attention(self._unet, work.attention, device, self._dtype)
        self._optimizer = AdamW8bit(params=self._unet.parameters(), lr=LR, min_8bit_size=4096)
        self._schedule: Any = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        # Cached, as ours: one sample of each, which is what such caches keep.
        mean, logvar = work.moments(family)
        self._latents = (mean + torch.exp(logvar / 2) * torch.randn_like(mean)).to(device)
        sizes = collated([family.view_conditioning(view) for view in work.views])
        self._conditioning = brought(work.text(family) | sizes, device, torch.float32)

    def step(self) -> None:
        noise = torch.randn_like(self._latents)
        timesteps = torch.randint(0, 1000, (self._work.rows,), device=self._device)
        noisy = self._schedule.add_noise(self._latents, noise, timesteps)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            prediction = self._family.denoise(self._unet, noisy, timesteps, self._conditioning)
        instance = slice(0, self._work.batch)
        loss = F.mse_loss(prediction[instance].float(), noise[instance])
        if self._work.prior:
            loss = loss + F.mse_loss(prediction[self._work.batch :].float(), noise[self._work.batch :])
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def everywhere(family: Blank) -> Strategy:
    return Strategy(family.checkpoint_steps, family.checkpoint_steps)


def random_denoiser(family: Blank, narrow: Callable[[Tensor], Tensor]) -> Any:
    """The denoiser with weights of the size that trained ones have: one block of them over and over, which is as good
    here and takes no minute to draw."""
    network: Any = family.load_denoiser(narrow)
    block = 0.02 * torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                for part in parameter.view(-1).split(len(block)):
                    part.copy_(block[: len(part)])
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return network


def measured(recipe: Recipe, steps: int, device: torch.device) -> dict[str, float]:
    """One step that does not count, then `steps` that do: seconds (median, quartiles) and peaks in GiB."""
    recipe.step()
    settle(device)
    first_done = time.time()
    reset_peaks(device)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        recipe.step()
        settle(device)
        seconds.append(time.perf_counter() - began)
    low, middle, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"first_done": first_done, "step_s": middle, "low_s": low, "high_s": high, **peaks(device)}
