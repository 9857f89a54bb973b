"""The autoencoder learns colours that the world does not have, and keeps its latents for those it has.

The world is drawn in ten colours; an autoencoder that saw only these fades the colours of a new individual, which no
training of the denoiser can bring back. (Stable Diffusion's has seen far more pictures than its captioned ones.) So
after the base model is trained it goes on, half on scenes, half on pictures whose hue is turned by an angle that
changes across the picture. The base model stays valid, since latents of scenes are held to where they were.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram_db.demo.autoencoder import psnr, reconstruct
from lowvram_db.demo.scenes import to_pixels
from lowvram_db.demo.stage import Budget, Fit

ANCHOR_WEIGHT = 0.1  # of a latent's squared way from its place, in variances, beside a squared error of 0.008 at 27 dB
UNTURNED_SHARE = 0.3
FASTEST_TURN = 2.2 * math.pi  # of the hue, radians from the middle of a picture to its edge


def turned_hue(pixels: Tensor, angle: Tensor) -> Tensor:
    """Colours of (B, 3, H, W) turned about the grey axis by `angle` (B, H, W), in radians; not clamped."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    same, after, before = (1 + 2 * cos) / 3, (1 - cos - math.sqrt(3) * sin) / 3, (1 - cos + math.sqrt(3) * sin) / 3
    red, green, blue = pixels.unbind(1)
    return torch.stack(
        [
            same * red + after * green + before * blue,
            before * red + same * green + after * blue,
            after * red + before * green + same * blue,
        ],
        1,
    )


def recoloured(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """(B, 3, H, W) with channels swapped and, but for UNTURNED_SHARE, hues turned: some evenly, most as a rainbow."""
    count, _, side, _ = pixels.shape

    def uniform(low: float, high: float, *rest: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, 1, 1, *rest)).astype(np.float32)).to(pixels)

    def chance(share: float, *rest: int) -> Tensor:
        return torch.from_numpy(rng.random((count, 1, 1, *rest)) < share).to(pixels.device)

    swapped = pixels[:, torch.from_numpy(rng.permutation(3)).to(pixels.device)]
    axis = torch.linspace(-1, 1, side).to(pixels)
    direction, start = uniform(0, 2 * math.pi), uniform(0, 2 * math.pi)
    rate = uniform(0, FASTEST_TURN) * chance(0.7)
    angle = start + rate * (torch.cos(direction) * axis.view(1, 1, -1) + torch.sin(direction) * axis.view(1, -1, 1))
    turned = (turned_hue(swapped, angle) * uniform(0.8, 1.2, 1)).clamp(-1, 1)
    return torch.where(chance(UNTURNED_SHARE, 1), swapped, turned)


def widen(
    vae: AutoencoderKL, stream: np.ndarray, looks: np.ndarray, held_out: np.ndarray, budget: Budget, folder: Path
) -> None:
    """`stream`, `looks` and `held_out` are uint8 (N, 64, 64, 3): scenes, pictures to recolour, scenes to measure on.

    Measures PSNR on held-out scenes and on recoloured pictures, and how far the latents of held-out scenes moved: their
    mean squared way as a share of their variance."""
    device, half = vae.device.type, budget.batch // 2
    before = copy.deepcopy(vae).requires_grad_(False)
    variance = latents_of(before, to_pixels(stream[:1000], device)).var()

    def mixed(rng: np.random.Generator, count: int) -> Tensor:
        scenes = to_pixels(stream[np.sort(rng.integers(0, len(stream), count))], device)
        others = to_pixels(looks[np.sort(rng.integers(0, len(looks), count))], device)
        return torch.cat([scenes, recoloured(others, rng)])

    def loss_of(step: int) -> Tensor:
        pixels = mixed(np.random.default_rng((6, step)), half)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                places = before.encode(pixels[:half]).latent_dist.mode()
            latents = vae.encode(pixels).latent_dist.mode()
            output = vae.decode(latents).sample.float()
        moved = F.mse_loss(latents[:half].float(), places.float()) / variance
        return F.mse_loss(output, pixels) + ANCHOR_WEIGHT * moved

    scenes = to_pixels(held_out[:200], device)
    places, colourful = latents_of(before, scenes), mixed(np.random.default_rng(99), 100)[100:]

    def measure(average: nn.Module) -> dict[str, float]:
        assert isinstance(average, AutoencoderKL)
        return {
            "psnr": psnr(reconstruct(average, scenes), scenes),
            "psnr recoloured": psnr(reconstruct(average, colourful), colourful),
            "moved": (F.mse_loss(latents_of(average, scenes), places) / places.var()).item(),
        }

    Fit("wide", vae.train(), budget, folder).run(loss_of, measure)


@torch.inference_mode()
def latents_of(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Posterior means (N, 4, 16, 16)."""
    return torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(50)])
