"""Config files of the parts of a Stable Diffusion model: read, and checked against what can be trained."""

import inspect
import math
from pathlib import Path
from typing import Any, get_args

from transformers import CLIPTextConfig

from lowvram_db.errors import UserError
from lowvram_db.files.foreign import naming, read_json

NOT_BUILT = "no network can be made of it"
_MOST_LAYERS = 100  # of one block or encoder; a slip of the pen would be built for hours
_DEPTHS = (
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "num_hidden_layers",
)
_MOST_LATENTS = 1024  # a side
_REFINER = "it is the second stage of Stable Diffusion XL, a refiner; train the base model"

# Blocks that are called as a text-to-image UNet calls them; each has a twin on the way up. diffusers' others want more.
_WAYS_DOWN = {
    "DownBlock2D": "UpBlock2D",
    "CrossAttnDownBlock2D": "CrossAttnUpBlock2D",
    "AttnDownBlock2D": "AttnUpBlock2D",
    "SimpleCrossAttnDownBlock2D": "SimpleCrossAttnUpBlock2D",
    "ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D",
}

# Fields of a UNet that make it want something of us that a prompt does not give, or let a part of it lie idle.
_NOT_SERVED = {
    "class_embed_type": (None, "wants class labels beside the prompt"),
    "num_class_embeds": (None, "wants class labels beside the prompt"),
    "encoder_hid_dim": (None, "wants other embeddings than the text encoder's"),
    "encoder_hid_dim_type": (None, "wants other embeddings than the text encoder's"),
    "time_cond_proj_dim": (None, "is distilled (it takes the guidance scale as an input), which training would undo"),
    "time_embedding_type": ("positional", "embeds the time by random numbers that must not be trained"),
    "dual_cross_attention": (False, "wants picture embeddings beside the prompt"),
    "attention_type": ("default", "wants boxes beside the prompt"),
}


def check_index(folder: Path, networks: dict[str, type[Any]], others: tuple[str, ...]) -> None:
    """Raises UserError where model_index.json names other classes for these networks, or lacks one of the parts."""
    path = folder / "model_index.json"
    index = read_json(path, "a model folder in diffusers' format has one")
    if "text_encoder_2" in networks and index.get("text_encoder") == [None, None]:
        raise UserError(f"{path}: has one text encoder; {_REFINER}")
    for part in (*networks, *others):
        entry = index.get(part)
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            raise UserError(f"{path}: {part} should be a library and a class, and is {entry!r}")
        if part in networks and entry[1] != networks[part].__name__:
            raise UserError(f"{path}: {part} is a {entry[1]}; a {networks[part].__name__} is supported")


def read_config(folder: Path, part: str, network: type[Any]) -> dict[str, Any]:
    """The config of a part that diffusers' class `network` makes, with its defaults where the file says nothing.

    Raises UserError for a field that it does not know (diffusers would leave it out with a warning, and build another
    network than the file means), and for a value of another kind than its default's.
    """
    path = folder / part / "config.json"
    config = read_json(path, "a Stable Diffusion model folder has one")
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    known = inspect.signature(network).parameters
    for key, value in fields.items():
        if key not in known:
            raise UserError(f"{path}: unknown field {key}; diffusers' {network.__name__} has none of that name")
        default, may_be_null = known[key].default, type(None) in get_args(known[key].annotation)
        if not (default is None or (may_be_null if value is None else _is_like(value, default))):
            raise UserError(f"{path}: {key} cannot be {value!r}; diffusers' default is {default!r}")
    _check_depth(path, fields)
    return {key: parameter.default for key, parameter in known.items()} | fields


def read_text_config(folder: Path, part: str) -> CLIPTextConfig:
    """The config of a CLIP text encoder. Raises UserError for one that makes none."""
    path = folder / part / "config.json"
    config = read_json(path, "a Stable Diffusion model folder has one")
    _check_depth(path, config)
    with naming(path, NOT_BUILT):
        return CLIPTextConfig(**config)


def check_unet(
    folder: Path, unet: dict[str, Any], channels: int, text_widths: list[int], addition: str | None = None
) -> None:
    """Raises UserError where UNet, VAE and text encoders do not belong together, or the UNet wants what it will not
    get.

    text_widths: of the text encoders, whose words stand side by side. addition: the kind of further embeddings that
    this family gives the UNet.
    """
    takes, gives = unet["in_channels"], unet["out_channels"]
    if (takes, gives) != (channels, channels):
        raise UserError(
            f"{folder / 'unet'}: takes {takes} and gives {gives} channels where a text-to-image UNet has "
            f"{channels} and {channels}; inpainting and edit models cannot be trained"
        )
    for key, (served, reason) in _NOT_SERVED.items():
        if unet[key] != served:
            raise UserError(f"{folder / 'unet' / 'config.json'}: {key} is {unet[key]!r}: this UNet {reason}")
    for key, supported in (("down_block_types", [*_WAYS_DOWN]), ("up_block_types", [*_WAYS_DOWN.values()])):
        strange = [kind for kind in unet[key] if kind not in supported]
        if strange:
            raise UserError(
                f"{folder / 'unet' / 'config.json'}: {key} has {strange[0]!r}; supported: {', '.join(supported)}"
            )
    if unet["addition_embed_type"] != addition:
        raise UserError(
            f"{folder / 'unet' / 'config.json'}: addition_embed_type is {unet['addition_embed_type']!r}, "
            f"and this kind of model gives {addition!r}; it belongs to another kind"
        )
    wanted, given = unet["cross_attention_dim"], sum(text_widths)
    widths = wanted if isinstance(wanted, list) else [wanted]
    if any(width != given for width in widths):
        is_refiner = len(text_widths) > 1 and set(widths) == {text_widths[-1]}
        meaning = _REFINER if is_refiner else "they are of different models"
        names = "text_encoder/ gives" if len(text_widths) == 1 else "the text encoders give"
        raise UserError(f"{folder / 'unet'}: wants text {wanted} wide, but {names} {given}; {meaning}")


def check_vae(folder: Path, vae: dict[str, Any]) -> None:
    """Raises UserError for a VAE whose latents are scaled otherwise than by one factor."""
    path = folder / "vae" / "config.json"
    if not vae["scaling_factor"] > 0:
        raise UserError(f"{path}: scaling_factor is {vae['scaling_factor']}, and must be above 0")
    for key in ("shift_factor", "latents_mean", "latents_std"):
        if vae.get(key) is not None:
            raise UserError(f"{path}: {key} is set; Stable Diffusion's latents are only scaled")


def latents_a_side(folder: Path, unet: dict[str, Any]) -> int:
    """The size a UNet was made for, 64 where its config says nothing. Raises UserError where it is no square."""
    size = 64 if unet["sample_size"] is None else unet["sample_size"]
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if type(height) is not int or height != width or not 0 < height <= _MOST_LATENTS:
        raise UserError(f"{folder / 'unet' / 'config.json'}: sample_size cannot be {size!r}; SD 1.5 has 64")
    return height


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value is of a default's kind, or a list of such: one for each block."""
    if isinstance(default, tuple) and not isinstance(value, list):
        return False
    if isinstance(value, list):
        kind = default[0] if isinstance(default, tuple) else default
        return bool(value) and all(_is_like(item, kind) for item in value)
    if isinstance(default, bool | str):
        return isinstance(value, type(default))
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_depth(path: Path, config: dict[str, Any]) -> None:
    for key in _DEPTHS:
        if _largest(config.get(key)) > _MOST_LAYERS:
            raise UserError(f"{path}: {key} is above {_MOST_LAYERS}: {config[key]}")


def _largest(value: Any) -> float:
    if isinstance(value, list):
        return max(map(_largest, value), default=0)
    return value if isinstance(value, int | float) else 0
