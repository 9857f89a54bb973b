"""What a run trains: answered here for the learner, for checkpoints and for the finished model."""

from typing import Any

from torch import Tensor, nn

from lowvram_db.config import Config
from lowvram_db.families.base import Architecture
from lowvram_db.memory.device import DTYPES
from lowvram_db.memory.quantised import quantise
from lowvram_db.optim.storage import narrowing
from lowvram_db.train import adapter

Trained = dict[str, nn.Parameter]  # by the names of network and tensor, as "unet.conv_in.weight"


def trains_text(config: Config, step: int) -> bool:
    """Whether a step trains the text encoders; what one says that is not trained is cached."""
    settings = config.text_encoder
    return settings.train and (settings.stop is None or step < settings.stop)


def stage_end(config: Config, step: int) -> int:
    """The first step after this one before which something else is trained than in this one, else the run's last."""
    stop = config.text_encoder.stop
    return stop if stop is not None and step < stop else config.train.steps


def steps_of(config: Config, step: int) -> tuple[str, str]:
    """What the first and every further step of a stage is called in a plan."""
    frozen = ", frozen text" if config.text_encoder.train and not trains_text(config, step) else ""
    return f"first step{frozen}", f"steady step{frozen}"


def load_networks(config: Config, family: Architecture, step: int) -> dict[str, Any]:
    """The networks that hold what a step trains, anew, the denoiser first, by their names in the model folder: on the
    CPU, in float32 but for what the optimizer stores in fewer bits, or what is frozen. Raises UserError where a LoRA
    does not go with them."""
    if config.method.name == "lora":
        return _with_adapters(config, family, step)
    networks: dict[str, Any] = {family.denoiser_part: family.load_denoiser(narrowing(config.weights))}
    if trains_text(config, step):
        networks |= family.load_text_encoders()
    return networks


def _with_adapters(config: Config, family: Architecture, step: int) -> dict[str, Any]:
    """The networks frozen, in the precision that is computed in or fewer bits, and a LoRA on each."""
    method, dtype = config.method, DTYPES[config.precision.compute]
    exact = config.weights == "fp32"  # so that it computes under autocast, which takes norms in float32

    def narrow(weight: Tensor) -> Tensor:
        return weight if exact and weight.dim() == 1 else weight.to(dtype)

    networks: dict[str, Any] = {family.denoiser_part: family.load_denoiser(narrow)}
    if trains_text(config, step):
        networks |= family.load_text_encoders(dtype)
    for part, network in networks.items():
        listened_to = family.trainable(part, network)
        if method.base in ("int8", "nf4"):
            quantise(network, method.base, dtype)
        adapter.adapt(network, part, method, listened_to, config.train.seed)
    return networks


def trained(family: Architecture, networks: dict[str, Any]) -> Trained:
    """What is trained of them."""
    return {
        f"{part}.{name}": parameter
        for part, network in networks.items()
        for name, parameter in adapter.trainable(network, family.trainable(part, network)).items()
    }


def idle(family: Architecture, networks: dict[str, Any]) -> list[nn.Parameter]:
    """What trained networks hold beside it, as layers that nobody listens to; they are gone through all the same. Under
    a LoRA a network stays as it was loaded."""
    listened_to = set(trained(family, networks).values())
    whole = [network for network in networks.values() if not adapter.is_adapted(network)]
    return [weight for network in whole for weight in network.parameters() if weight not in listened_to]


def denoisers(family: Architecture, everything: Trained) -> Trained:
    """What is trained of the denoiser alone: the first of everything."""
    return {name: weight for name, weight in everything.items() if name.startswith(f"{family.denoiser_part}.")}


def groups(config: Config, family: Architecture, everything: Trained) -> list[dict[str, Any]]:
    """Of what is trained, as an optimizer takes it, with the learning rate that schedule and warm-up start from."""
    own = denoisers(family, everything)
    others = {name: weight for name, weight in everything.items() if name not in own}
    rates = (own, config.train.lr), (others, config.text_encoder_lr)
    return [{"params": list(group.items()), "lr": lr, "initial_lr": lr} for group, lr in rates if group]
