"""What kind of model a file holds, by the keys and shapes of its tensors alone."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from lowvram_db.formats.header import Entry
from lowvram_db.formats.layout import LAYOUTS, UNET_PREFIX, VAE_PREFIX

_FIRST = f"{UNET_PREFIX}input_blocks.0.0.weight"
_KEYS_AND_VALUES = re.compile(re.escape(UNET_PREFIX) + r".*\.attn2\.to_k\.weight")

FAMILY_WORDS = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
_FAMILIES_BY_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # width of the text, where no encoder tells
_REFINER_CONTEXT = 1280
_REFINER = "the refiner of Stable Diffusion XL, which finishes the pictures of another model"
_TAKES = {
    9: "an inpainting model, which takes a mask and a picture beside the latents",
    8: "a model that edits pictures, which takes one beside the latents",
    7: "an upscaler, which takes a picture beside the latents",
    5: "a depth model, which takes a depth map beside the latents",
}  # channels into the UNet, where a text-to-image model has 4
_MARKED = {
    "edm_mean": "Playground, whose noise schedule (EDM) is another",
    "edm_vpred.sigma_max": "CosXL, whose noise schedule (EDM) is another",
}

# In this order; the first of which a key has that part. With what stands before a part where other programs put it.
_OTHERS = [
    (
        r"\.(lora_(up|down|A|B)|lora\.(up|down))\.|\.hada_w\d|\.lokr_w\d|\.oft_blocks",
        "a LoRA or another adapter, which changes a model and is none",
    ),
    (
        r"^(emb_params|string_to_param|string_to_token)$|^clip_[lg]$",
        "a textual-inversion embedding, which is a word for a model and no model",
    ),
    (
        r"^control_model\.|input_hint_block|controlnet_cond_embedding|controlnet_\w+_blocks",
        "a ControlNet, which steers a model and is none",
    ),
    (r"(^|\.)double_stream_modulation_img\.", "FLUX.2"),
    (r"(^|\.)distilled_guidance_layer\.", "Chroma"),
    (r"(^|\.)txt_in\.individual_token_refiner\.", "HunyuanVideo"),
    (r"(^|\.)double_blocks\.\d+\.(img|txt)_(attn|mod)\.|(^|\.)single_transformer_blocks\.", "FLUX.1"),
    (r"(^|\.)joint_blocks\.\d+\.|(^|\.)transformer_blocks\.\d+\.norm1_context\.", "Stable Diffusion 3"),
    (r"(^|\.)noise_refiner\.\d+\.|(^|\.)cap_embedder\.", "Z-Image or Lumina"),
    (r"(^|\.)transformer_blocks\.\d+\.(img|txt)_mod\.", "Qwen-Image"),
    (r"(^|\.)double_layers\.\d+\.", "AuraFlow"),
    (r"(^|\.)mlp_t5\.", "Hunyuan-DiT"),
    (r"(^|\.)t_block\.1\.|(^|\.)adaln_single\.", "PixArt or LTX-Video"),
    (r"(^|\.)clf\.1\.|(^|\.)effnet_mapper\.", "Stable Cascade"),
    (r"(^|\.)head\.modulation$", "Wan"),
    (r"(^|\.)time_(stack|mixer)\.|(^|\.)temporal_transformer\.", "a video model"),
    (r"(^|\.)llm_adapter\.|(^|\.)x_embedder\.proj\.", "Cosmos or another model without a UNet"),
    (
        r"^(down_blocks|mid_block|up_blocks)\..*(attentions|resnets)\.",
        "a UNet alone in diffusers' format; name the folder that its unet/ is in",
    ),
    (
        r"^(model\.)?(diffusion_model\.)?(input_blocks|middle_block|output_blocks)\.",
        "a UNet alone, without a text encoder and a VAE",
    ),
    (
        rf"^({re.escape(VAE_PREFIX)}|vae\.)?(encoder|decoder)\.(down|up|mid|conv_in)",
        "a VAE alone, which can be named as model.vae beside a model",
    ),
    (
        r"(^|\.)(text_model|resblocks|transformer\.h|encoder\.block)\.|(^|\.)layers\.\d+\.self_attn\.",
        "a text encoder alone, which can be named as model.text_encoder beside a model",
    ),
    (r"^body\.|^model\.\d+\.|\.RDB\d\.|^conv_first\.", "an upscaler of pictures (ESRGAN or the like)"),
]


class Kind(NamedTuple):
    """family: the name of a layout; None where no model of this kind can be trained here, and `words` tell which it
    is."""

    family: str | None
    words: str


def kind_of(tensors: Mapping[str, Entry]) -> Kind:
    """What a file is, whose header says this."""
    if _FIRST not in tensors:
        return Kind(None, next((words for part, words in _OTHERS if _has(tensors, part)), "no model known here"))
    for marker, words in _MARKED.items():
        if marker in tensors:
            return Kind(None, words)
    takes = tensors[_FIRST].shape[1] if len(tensors[_FIRST].shape) > 1 else 0
    if takes != 4:
        return Kind(None, _TAKES.get(takes, f"a UNet that takes {takes} channels, where latents have 4"))
    family = _family(tensors)
    if family is None:
        return Kind(None, _REFINER if _is_refiner(tensors) else "a UNet of no known family")
    if family != "sdxl" and _has(tensors, rf"^{re.escape(UNET_PREFIX)}label_emb\."):
        return Kind(None, "a model that takes picture embeddings or levels of noise beside the prompt")
    return Kind(family, FAMILY_WORDS[family])


def _family(tensors: Mapping[str, Entry]) -> str | None:
    """By the text encoders it has, the last one first: the refiner has SDXL's second in the place of the first."""
    for family, parts in reversed(LAYOUTS.items()):
        if any(key.startswith(list(parts.values())[-1].prefix) for key in tensors):
            return family
    return _FAMILIES_BY_CONTEXT.get(_context(tensors)) if not _is_refiner(tensors) else None


def _is_refiner(tensors: Mapping[str, Entry]) -> bool:
    return _has(tensors, r"^conditioner\.embedders\.0\.model\.") or _context(tensors) == _REFINER_CONTEXT


def _context(tensors: Mapping[str, Entry]) -> int:
    """How wide the text is that the UNet listens to; 0 where it listens to none."""
    return next((e.shape[-1] for key, e in tensors.items() if _KEYS_AND_VALUES.match(key) and len(e.shape) == 2), 0)


def _has(tensors: Mapping[str, Entry], part: str) -> bool:
    found = re.compile(part)
    return any(found.search(key) for key in tensors)
