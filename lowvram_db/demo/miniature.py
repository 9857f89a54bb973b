"""A Stable Diffusion pipeline in miniature with random weights, and photos to train it on.

It has every part of a real one, from diffusers' and transformers' own classes, and knows nothing: it shows that a run
works from end to end, not what DreamBooth can do.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lowvram_db.formats.tokenizer import byte_letters, read_vocabulary, write_vocabulary

MINIATURE_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
MINIATURE_VAE: dict[str, Any] = {
    "block_out_channels": (16, 32, 32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 64,
}
MINIATURE_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 32,
}


def write_pipeline(
    folder: Path,
    *,
    unet: dict[str, Any] = MINIATURE_UNET,
    vae: dict[str, Any] = MINIATURE_VAE,
    text: dict[str, Any] = MINIATURE_TEXT,
    prediction_type: str = "epsilon",
    seed: int = 0,
) -> None:
    """Write a Stable Diffusion pipeline of these configs, with random weights, into `folder` in diffusers' format."""
    torch.manual_seed(seed)
    tokenizer = _letter_tokenizer()
    text_config = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, **text}
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(**unet),
        vae=AutoencoderKL(**vae),
        text_encoder=CLIPTextModel(CLIPTextConfig(eos_token_id=tokenizer.eos_token_id, **text_config)),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    write_classic_tokenizer(folder / "tokenizer")


def write_classic_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json, as models on the hub have them, for tools that read those."""
    write_vocabulary(folder, read_vocabulary(folder))


def _letter_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without a single merge: every byte is a token, and another one at the end of a word."""
    letters = list(byte_letters().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=77)


def write_photos(folder: Path, count: int = 5, side: int = 96) -> None:
    """Draw `count` pictures of one striped ball at different places into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        photo = Image.new("RGB", (side, side), (60 + 30 * number, 140, 200 - 30 * number))
        draw = ImageDraw.Draw(photo)
        left, top, width = 10 + 6 * number, 30 - 5 * number, side // 2
        draw.ellipse((left, top, left + width, top + width), fill="gold", outline="black")
        for stripe in (width // 3, width // 2, 2 * width // 3):
            draw.line((left + 4, top + stripe, left + width - 4, top + stripe), fill="crimson", width=3)
        photo.save(folder / f"{number:02d}.png")
