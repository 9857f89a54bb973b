"""`python -m lowvram_db.demo.pretrain --out DIR`: makes the miniature base model and its critic from nothing.

Stages: tokenizer, autoencoder, text encoder alone, text encoder and UNet together, decoder, autoencoder on more
colours, critic, export. Each leaves its result in DIR and is passed over when that is there; a stage that was killed
goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

import torch

from lowvram_db.demo.autoencoder import encode_all, polish_decoder, soften_all, train_vae
from lowvram_db.demo.critic import train_critic
from lowvram_db.demo.denoiser import train_base
from lowvram_db.demo.export import export
from lowvram_db.demo.reader import train_reader
from lowvram_db.demo.scenes import pictures
from lowvram_db.demo.stage import Budget
from lowvram_db.demo.tokenizer import train_tokenizer
from lowvram_db.demo.widen import widen

STAGES = ("vae", "base", "decoder", "wide", "critic", "export")
VAE = Budget(steps=2_500, batch=16, lr=1e-3, decay=0.5, measure_steps=500)
DECODER = Budget(steps=400, batch=16, lr=4e-4, warmup=20, decay=0.8, average=0.99, measure_steps=200)
WIDE = Budget(steps=3_700, batch=16, lr=6e-4, warmup=50, decay=0.7, average=0.99, measure_steps=250)
READER = Budget(steps=1_500, batch=64, lr=1e-3, warmup=100, measure_steps=500)
CRITIC = Budget(steps=4_000, batch=32, lr=1e-3, decay=0.6, measure_steps=500)
BASE = Budget(steps=10_500, batch=32, lr=8e-4, warmup=300, decay=0.6, measure_steps=1_000)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the shipped weights were made with."""

    scenes: int = 60_000
    held_out: int = 2_000
    looks: int = 24_000
    latents: int = 32_000
    vae: Budget = VAE
    decoder: Budget = DECODER
    wide: Budget = WIDE
    reader: Budget = READER
    critic: Budget = CRITIC
    base: Budget = BASE


def run(settings: Settings, out: Path, device: str, until: str = STAGES[-1]) -> None:
    """Goes through the stages up to `until`. Leaves `out`/base, `out`/critic.safetensors, the curves, settings.json."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n", encoding="utf-8")
    last = STAGES.index(until)
    tokenizer = train_tokenizer()
    stream, held_out = pictures("stream", settings.scenes, out), pictures("held-out", settings.held_out, out)
    vae = train_vae(stream, held_out, settings.vae, out, device)
    if last >= 1:
        moments = encode_all(vae, stream[: settings.latents], out / "moments.pt", device)
        text_encoder = train_reader(tokenizer, settings.latents, settings.reader, out, device)
        base = train_base(moments, vae.config.scaling_factor, text_encoder, tokenizer, settings.base, out, device)
    if last >= 2:
        polish_decoder(vae, stream, held_out, settings.decoder, out)
    if last >= 3:
        looks = pictures("critic", settings.looks, out)
        widen(vae, stream, looks, held_out, settings.wide, out)
    if last >= 4:
        soft = soften_all(vae, looks, out / "critic-soft.npy")
        critic = train_critic(stream, looks, soft, held_out, settings.critic, out, device)
    if last >= 5:
        export(base, vae, critic, tokenizer, out / "export")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lowvram_db.demo.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, curves and the result")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    run(Settings(), given.out, given.device, given.until)


if __name__ == "__main__":
    main()
