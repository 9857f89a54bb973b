"""From trained networks to a pipeline folder that StableDiffusionPipeline.from_pretrained reads, in fp16."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from lowvram_db.demo.critic import Critic
from lowvram_db.demo.denoiser import Base, pipeline_of
from lowvram_db.demo.miniature import write_classic_tokenizer

BASE_FOLDER = Path(__file__).parent / "base"


def export(base: Base, vae: AutoencoderKL, critic: Critic, tokenizer: CLIPTokenizer, out: Path) -> None:
    """Writes `out`/base (the pipeline) and `out`/critic.safetensors, both in fp16. Leaves its arguments as they are."""
    folder = out / "base"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pipeline_of(copy.deepcopy(base), copy.deepcopy(vae), tokenizer).to(dtype=torch.float16).save_pretrained(folder)
    write_classic_tokenizer(folder / "tokenizer")
    _load_in_full_precision(folder / "text_encoder" / "config.json")
    weights = {key: value.half().contiguous() for key, value in critic.state_dict().items()}
    save_file(weights, out / "critic.safetensors")


def _load_in_full_precision(config: Path) -> None:
    """Without a dtype asked for, diffusers loads its networks in fp32, but transformers in the dtype named here."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
