"""Stable Diffusion pipelines in miniature with random weights, of every generation, and photos to train them on.

Each has every part of a real one, from diffusers' and transformers' own classes, and knows nothing: it shows that a run
works from end to end, not what DreamBooth can do.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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


# As Stable Diffusion 2.x has it: heads of a width that all blocks share, projections by linear layers, OpenCLIP's gelu.
SD2_UNET: dict[str, Any] = MINIATURE_UNET | {"attention_head_dim": (4, 8), "use_linear_projection": True}
SD2_TEXT: dict[str, Any] = MINIATURE_TEXT | {"hidden_act": "gelu", "num_hidden_layers": 3, "projection_dim": 16}

# As SDXL has it: more transformer layers the coarser the block, pooled text and six sizes beside the time.
SDXL_TEXT_2: dict[str, Any] = SD2_TEXT | {"hidden_size": 48, "intermediate_size": 96, "projection_dim": 48}
SDXL_UNET: dict[str, Any] = SD2_UNET | {
    "cross_attention_dim": 32 + 48,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 48 + 6 * 8,
}
SDXL_VAE: dict[str, Any] = MINIATURE_VAE | {"scaling_factor": 0.13025, "force_upcast": True}


def write_pipeline(
    folder: Path,
    *,
    unet: dict[str, Any] = MINIATURE_UNET,
    vae: dict[str, Any] = MINIATURE_VAE,
    text: dict[str, Any] = MINIATURE_TEXT,
    text_2: dict[str, Any] | None = None,
    seed: int = 0,
    **schedule: Any,
) -> None:
    """Write a Stable Diffusion pipeline of these configs, with random weights, into `folder` in diffusers' format.

    text_2: of a second text encoder, which makes it one of Stable Diffusion XL. schedule: what the scheduler's config
    has other than Stable Diffusion 1.5's.
    """
    torch.manual_seed(seed)
    tokenizer = letter_tokenizer()
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(**unet),
        "vae": AutoencoderKL(**vae),
        "text_encoder": CLIPTextModel(_text_config(tokenizer, text)),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            **schedule,
        ),
    }
    if text_2 is None:
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**parts, **nothing).save_pretrained(folder)
    else:
        tokenizer_2 = letter_tokenizer(pad_token="!")
        encoder = CLIPTextModelWithProjection(_text_config(tokenizer_2, text_2))
        pipeline = StableDiffusionXLPipeline(**parts, text_encoder_2=encoder, tokenizer_2=tokenizer_2)
        pipeline.save_pretrained(folder)
        write_classic_tokenizer(folder / "tokenizer_2")
    write_classic_tokenizer(folder / "tokenizer")


def write_sd2(folder: Path, **schedule: Any) -> None:
    """As write_pipeline: a miniature of Stable Diffusion 2.x, predicting v if nothing else is said."""
    write_pipeline(folder, unet=SD2_UNET, text=SD2_TEXT, **{"prediction_type": "v_prediction", **schedule})


def write_sdxl(folder: Path, **schedule: Any) -> None:
    """As write_pipeline: a miniature of Stable Diffusion XL."""
    write_pipeline(folder, unet=SDXL_UNET, vae=SDXL_VAE, text_2=SDXL_TEXT_2, **schedule)


def _text_config(tokenizer: CLIPTokenizer, text: dict[str, Any]) -> CLIPTextConfig:
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPTextConfig(**{"vocab_size": len(tokenizer), **tokens, **text})


def write_classic_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json, as models on the hub have them, for tools that read those."""
    write_vocabulary(folder, read_vocabulary(folder))


def letter_tokenizer(**special: str) -> CLIPTokenizer:
    """CLIP's tokenizer without a single merge: every byte is a token, and another one at the end of a word."""
    letters = list(byte_letters().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=77, **special
    )


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
