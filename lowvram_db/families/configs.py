"""Config files of the parts of a Stable Diffusion model: read, and checked against what can be trained."""

import inspect
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler

from lowvram_db.errors import UserError
from lowvram_db.families.base import NoiseSchedule
from lowvram_db.families.source import read_json

_PREDICTION_TYPES = ("epsilon", "v_prediction")


def read_config(folder: Path, part: str, network: type[Any]) -> dict[str, Any]:
    """The config of a part that diffusers' class `network` makes. Raises UserError for a field that it does not know:
    diffusers would leave it out with a warning, and build another network than the file means."""
    path = folder / part / "config.json"
    config = read_json(path, "a Stable Diffusion model folder has one")
    unknown = [key for key in config if key not in inspect.signature(network).parameters and not key.startswith("_")]
    if unknown:
        raise UserError(f"{path}: unknown field {unknown[0]}; diffusers' {network.__name__} has none of that name")
    return config


def check_unet(folder: Path, unet: dict[str, Any], channels: int, text_width: int) -> None:
    """Raises UserError where UNet, VAE and text encoder do not belong together."""
    takes, gives = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if (takes, gives) != (channels, channels):
        raise UserError(
            f"{folder / 'unet'}: takes {takes} and gives {gives} channels where a text-to-image UNet has "
            f"{channels} and {channels}; inpainting and edit models cannot be trained"
        )
    wanted = unet.get("cross_attention_dim", 1280)
    if wanted != text_width:
        raise UserError(
            f"{folder / 'unet'}: wants text {wanted} wide, but text_encoder/ gives {text_width}; "
            "they are of different models"
        )


def read_schedule(folder: Path) -> NoiseSchedule:
    """The noise schedule that stands in the model's scheduler config. Raises UserError for one we cannot train with."""
    path = folder / "scheduler" / "scheduler_config.json"
    settings = read_json(path, "the noise schedule and prediction type stand in it")
    kind = settings.get("prediction_type", "epsilon")
    if kind not in _PREDICTION_TYPES:
        raise UserError(f"{path}: prediction_type {kind!r} is not supported; {' and '.join(_PREDICTION_TYPES)} are")
    return NoiseSchedule(DDPMScheduler.from_config(settings).alphas_cumprod.float(), kind)
