"""What a run trains: answered here for the learner, for checkpoints and for the finished model."""

from typing import Any

from torch import nn

from lowvram_db.config import Config
from lowvram_db.families.base import Architecture
from lowvram_db.optim.storage import narrowing


def load_networks(config: Config, family: Architecture) -> dict[str, Any]:
    """The networks that hold what is trained, anew, by their names in the model folder: on the CPU, in float32 but for
    what the optimizer stores in fewer bits."""
    networks: dict[str, Any] = {family.denoiser_part: family.load_denoiser(narrowing(config.weights))}
    if config.train.text_encoder:
        networks |= family.load_text_encoders()
    return networks


def trained(family: Architecture, networks: dict[str, Any]) -> dict[str, nn.Parameter]:
    """What is trained of them, by the names of network and tensor, as "unet.conv_in.weight"."""
    return {
        f"{part}.{name}": parameter
        for part, network in networks.items()
        for name, parameter in family.trainable(part, network).items()
    }
