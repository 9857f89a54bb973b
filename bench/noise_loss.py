"""Noise and loss of a training step in three ways: `python bench/noise_loss.py`

Plain PyTorch operations with torch.randn, the same through torch.compile, and ours (kernels/noise_loss.py), forward and
backward down to the prediction's gradient. Appends a row a way to bench/results/noise_loss.csv: microseconds (median)
and the largest memory alive. Without a GPU ours runs as its PyTorch twin, and the row names the processor.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from adam8 import timed
from diffusers import DDPMScheduler
from machine import add_row
from torch import Tensor

from lowvram_db.families.base import NoiseSchedule
from lowvram_db.kernels.launch import runs_triton
from lowvram_db.kernels.noise_loss import noise_loss, noisy_latents
from lowvram_db.memory.device import pick_device
from lowvram_db.train import objective

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def plain(prediction: Tensor, mean: Tensor, logvar: Tensor, timesteps: Tensor, table: Tensor) -> Tensor:
    """Min-SNR-weighted v-prediction with a prior term, as a trainer would write it. Returns the gradient."""
    a, b, c, d, weight = table[timesteps].view(-1, 5, 1, 1, 1).unbind(1)
    latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    noise = torch.randn_like(latents)
    noisy = a * latents + b * noise
    leaf = prediction.detach().requires_grad_()
    rows = (weight * (leaf.float() - (c * latents + d * noise)).square()).flatten(1).mean(1)
    half = len(rows) // 2
    (gradient,) = torch.autograd.grad(rows[:half].mean() + rows[half:].mean() + 0 * noisy.sum(), leaf)
    return gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--latents", type=int, default=64, help="a side, of 4 channels")
    parser.add_argument("--repeats", type=int, default=50)
    given = parser.parse_args()
    device = pick_device()
    triton = runs_triton("auto", device)
    mean, logvar = torch.randn(2, given.rows, 4, given.latents, given.latents, device=device)
    prediction = torch.randn_like(mean, dtype=torch.bfloat16)
    timesteps = torch.randint(0, 1000, (given.rows,), device=device)
    table = objective.table(NoiseSchedule(SCHEDULER.alphas_cumprod, "v_prediction"), 5.0).to(device)
    address = torch.tensor([0, 1], device=device)
    weights = objective.row_weights(given.rows, given.rows // 2, 1.0).to(device)
    noised = (mean, logvar, timesteps, table)

    def ours() -> Tensor:
        noisy_latents(*noised, address, triton)
        leaf = prediction.detach().requires_grad_()
        total, _ = noise_loss(leaf, *noised, address, weights, triton=triton)
        return torch.autograd.grad(total, leaf)[0]

    compiled = torch.compile(plain)
    ways: dict[str, Callable[[], Any]] = {
        "plain operations": lambda: plain(prediction, *noised),
        "torch.compile": lambda: compiled(prediction, *noised),
        f"ours ({'Triton' if triton else 'PyTorch twin'})": ours,
    }
    for name, way in ways.items():
        try:
            seconds = timed(way, device, given.repeats)
        except Exception as error:  # torch.compile wants a C++ compiler on a CPU
            print(f"{name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
            continue
        peak = ""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            way()
            peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.2f}"
        row = {
            "way": name,
            "rows": given.rows,
            "latents": given.latents,
            "microseconds": f"{seconds * 1e6:.0f}",
            "peak_mib": peak,
        }
        add_row("noise_loss", row)
        print("  ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
