"""A model of a family's true sizes with random weights, written tensor by tensor: SDXL is made in 1 GiB of memory."""

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram_db.demo.miniature import letter_tokenizer
from lowvram_db.families import open_blank
from lowvram_db.files.writer import Planned, write_planned
from lowvram_db.formats.known import family_folder


def write_true_size(folder: Path, family: str) -> None:
    """Write "sd1", "sd2" or "sdxl" into a new folder in diffusers' format, in float16."""
    shutil.copytree(family_folder(family), folder)
    blank = open_blank(folder)
    networks: dict[str, Any] = {"vae": blank.load_vae(), **blank.load_text_encoders(), "unet": blank.load_denoiser()}
    for part, network in networks.items():
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        planned = {
            name: Planned(torch.float16, shape, partial(_random, name, shape, number))
            for number, (name, shape) in enumerate(shapes.items())
        }
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        write_planned(folder / part / f"{stem}.safetensors", planned, {"format": "pt"})
        if part.startswith("text_encoder"):
            pad = {"sdxl": {"text_encoder_2": {"pad_token": "!"}}}.get(family, {}).get(part, {})
            letter_tokenizer(**pad).save_pretrained(folder / part.replace("text_encoder", "tokenizer"))


def _random(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Such that no network's numbers grow or fade from layer to layer."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) > 1:
        return numbers / math.sqrt(math.prod(shape[1:]))
    return numbers / 10 + (1 if name.endswith("weight") else 0)
