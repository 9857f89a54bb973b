"""How good are the shipped base model and its critic?

    python bench/demo_base.py

Appends a row a figure to bench/results/demo_base.csv: the critic on scenes it never saw, the autoencoder's PSNR on
them, and how often the base model draws the class, colour and setting of 600 prompts, and of 300 whose combination no
training picture had.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from machine import add_row

from lowvram_db.demo.autoencoder import psnr, reconstruct
from lowvram_db.demo.critic import CRITIC_FILE, Critic, accuracy, labels_of, load_critic
from lowvram_db.demo.export import BASE_FOLDER
from lowvram_db.demo.measure import prompt_accuracy, prompts_to_check
from lowvram_db.demo.scenes import held_out_scene, to_pixels, unseen_combination
from lowvram_db.demo.world import Scene, render

REAL, PROMPTS, UNSEEN_PROMPTS = 1000, 600, 300


def drawn(scenes: list[Scene]) -> torch.Tensor:
    return to_pixels(np.stack([np.asarray(render(scene)) for scene in scenes]))


def measured(pipeline: StableDiffusionPipeline, critic: Critic) -> dict[str, float]:
    """Every metric by name; accuracies and rates as shares."""
    values: dict[str, float] = {}
    scenes = [held_out_scene(100_000 + i) for i in range(REAL)]
    pixels = drawn(scenes)
    values |= {f"critic {k}": v for k, v in accuracy(critic, pixels, labels_of(scenes)).items()}
    rare = [unseen_combination(i) for i in range(REAL // 2)]
    values |= {f"critic unseen {k}": v for k, v in accuracy(critic, drawn(rare), labels_of(rare)).items()}
    values["vae psnr dB"] = psnr(reconstruct(pipeline.vae, pixels), pixels)
    begun = time.monotonic()
    asked = prompts_to_check(PROMPTS, unseen=False)
    values |= {f"base {k}": v for k, v in prompt_accuracy(pipeline, critic, asked).items()}
    values["seconds a picture"] = (time.monotonic() - begun) / PROMPTS
    asked = prompts_to_check(UNSEEN_PROMPTS, unseen=True)
    values |= {f"base unseen {k}": v for k, v in prompt_accuracy(pipeline, critic, asked).items()}
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, critic)
    values["parameters"] = sum(p.numel() for part in parts for p in part.parameters())
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=BASE_FOLDER)
    parser.add_argument("--critic", type=Path, default=CRITIC_FILE)
    given = parser.parse_args()
    pipeline = StableDiffusionPipeline.from_pretrained(given.base)
    pipeline.set_progress_bar_config(disable=True)
    for metric, value in measured(pipeline, load_critic(given.critic)).items():
        print(f"{metric}: {value:.4g}", flush=True)
        add_row("demo_base", {"metric": metric, "value": f"{value:.6g}"})


if __name__ == "__main__":
    main()
