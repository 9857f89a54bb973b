"""The first stage: the autoencoder learns to fold a scene into 4x16x16 latents and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from lowvram_db.demo.models import make_vae
from lowvram_db.demo.scenes import to_pixels
from lowvram_db.demo.stage import Budget, Fit

KL_WEIGHT = 1e-4  # of the KL divergence a latent element, beside a mean squared error of about 0.008 at 27 dB
L1_WEIGHT = 0.2


def psnr(reconstructed: Tensor, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]: from the mean squared error over all of them."""
    error = F.mse_loss(reconstructed.float().clamp(-1, 1), pixels).item() / 4
    return float(-10 * np.log10(error))


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, pixels: Tensor, batch: int = 50) -> Tensor:
    parts = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pixels.split(batch)]
    return torch.cat(parts)


def train_vae(stream: np.ndarray, held_out: np.ndarray, budget: Budget, folder: Path, device: str) -> AutoencoderKL:
    """Learns on `stream` (uint8 (N, 64, 64, 3)); measures PSNR on `held_out`. Sets the scaling factor at the end."""
    torch.manual_seed(1)
    vae = make_vae().to(device)
    measured = to_pixels(held_out[:200], device)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((1, step))
        pixels = to_pixels(stream[np.sort(rng.integers(0, len(stream), budget.batch))], device)
        noise = torch.from_numpy(rng.standard_normal((budget.batch, 4, 16, 16), dtype=np.float32)).to(device)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            output = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = posterior.kl().float().mean() / noise[0].numel()
        return F.mse_loss(output, pixels) + L1_WEIGHT * F.l1_loss(output, pixels) + KL_WEIGHT * kl

    def measure(average: nn.Module) -> dict[str, float]:
        assert isinstance(average, AutoencoderKL)
        return {"psnr": psnr(reconstruct(average, measured), measured)}

    Fit("vae", vae, budget, folder).run(loss_of, measure)
    vae.register_to_config(scaling_factor=round(1 / latent_std(vae, to_pixels(stream[:1000], device)), 5))
    return vae


def polish_decoder(vae: AutoencoderKL, stream: np.ndarray, held_out: np.ndarray, budget: Budget, folder: Path) -> None:
    """The decoder learns on alone, on squared error only: latents stay what they are, so the denoiser does too."""
    device = vae.device.type
    measured = to_pixels(held_out[:200], device)
    decoder = nn.ModuleDict({"after": vae.post_quant_conv, "decoder": vae.decoder})
    with torch.inference_mode():
        folded = torch.cat([vae.encode(part).latent_dist.mode() for part in measured.split(50)])

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((5, step))
        pixels = to_pixels(stream[np.sort(rng.integers(0, len(stream), budget.batch))], device)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.mode()
            output = decoder["decoder"](decoder["after"](latents)).float()
        return F.mse_loss(output, pixels)

    def measure(average: nn.Module) -> dict[str, float]:
        assert isinstance(average, nn.ModuleDict)
        with torch.inference_mode():
            parts = [average["decoder"](average["after"](part)) for part in folded.split(50)]
        return {"psnr": psnr(torch.cat(parts), measured)}

    Fit("decoder", decoder, budget, folder).run(loss_of, measure)


@torch.inference_mode()
def latent_std(vae: AutoencoderKL, pixels: Tensor) -> float:
    return torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(50)]).std().item()


@torch.inference_mode()
def soften_all(vae: AutoencoderKL, pictures: np.ndarray, path: Path) -> np.ndarray:
    """What the autoencoder makes of every picture, uint8 (N, 64, 64, 3); kept at `path`."""
    if not path.exists():
        device, parts = vae.device.type, []
        for start in range(0, len(pictures), 100):
            pixels = to_pixels(pictures[start : start + 100], device)
            with torch.autocast(device, torch.bfloat16):
                output = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.float()
            parts.append(((output.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
        np.save(path, np.concatenate(parts))
    kept: np.ndarray = np.load(path, mmap_mode="r")
    return kept


@torch.inference_mode()
def encode_all(vae: AutoencoderKL, stream: np.ndarray, path: Path, device: str) -> Tensor:
    """Posterior moments of every picture, fp16 (N, 8, 16, 16): mean, then standard deviation; kept at `path`."""
    if path.exists():
        kept: Tensor = torch.load(path, weights_only=True)
        return kept
    parts = []
    for start in range(0, len(stream), 100):
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(to_pixels(stream[start : start + 100], device)).latent_dist
        parts.append(torch.cat([posterior.mean, posterior.std], 1).half().cpu())
    moments = torch.cat(parts)
    torch.save(moments, path)
    return moments
