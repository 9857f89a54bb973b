"""Config files of well-known models, so that a plan needs neither their weights nor the network."""

import json
from pathlib import Path
from typing import Any

_FOLDERS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1",
    "runwayml/stable-diffusion-v1-5": "sd1",
    "CompVis/stable-diffusion-v1-4": "sd1",
    "stabilityai/stable-diffusion-2": "sd2",
    "stabilityai/stable-diffusion-2-1": "sd2",
    "stabilityai/stable-diffusion-2-base": "sd2-base",
    "stabilityai/stable-diffusion-2-1-base": "sd2-base",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}


def known_configs(name: str) -> Path | None:
    """The folder of a hub id's config files, in diffusers' layout, or None."""
    return Path(__file__).parent / _FOLDERS[name] if name in _FOLDERS else None


def family_folder(family: str) -> Path:
    """The folder of the config files of "sd1", "sd2", "sd2-base" or "sdxl"."""
    return Path(__file__).parent / family


def is_packaged(folder: Path) -> bool:
    """Whether it is a folder of config files that comes with the package."""
    return folder.parent == Path(__file__).parent


def known_config(name: str, part: str) -> dict[str, Any]:
    """The settings of one part ("unet", "vae", ...) of a well-known model, as its class takes them."""
    config = json.loads((Path(__file__).parent / _FOLDERS[name] / part / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if not key.startswith("_")}
