"""A LoRA beside the layers of a frozen network (Hu et al. 2021), by peft: which layers have one, and how it begins."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lowvram_db.errors import UserError
from lowvram_db.formats.lora_file import Lora, LowRank, plain
from lowvram_db.sections import MethodConfig

_NAME = "default"  # peft's own
_DOWN, _UP = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"
_ROUNDS = 16  # of the subspace iteration by which PiSSA finds the largest directions, as peft's authors take them
_ATTENTION = r"to_[qkv]|to_out\.0|[qkv]_proj|out_proj"
_MLP = r"ff\.net\.0\.proj|ff\.net\.2|mlp\.fc[12]"
# What the files that open everywhere have no name for.
_NAMELESS = r"text_projection"
_TARGETS = {"attention": _ATTENTION, "attention+mlp": f"{_ATTENTION}|{_MLP}", "all": rf"(?!{_NAMELESS}).*"}


def adapt(network: nn.Module, part: str, settings: MethodConfig, trainable: Iterable[str], seed: int) -> None:
    """Freeze a network and give its layers a LoRA each, in float32, that changes nothing yet.

    trainable: names of the weights that have a part in what is learned; the others' layers get none. seed: of the
    random half. A layer that has fewer rows or columns than the rank gets as many as it has, and the same alpha / rank.
    By PiSSA (Meng et al. 2024) a matrix' begins with the weight's largest directions, and the weight is what is left.
    Raises UserError where no layer is meant, or the rank is larger than all of them have.
    """
    ranks = _ranks(network, settings.targets, set(trainable))
    if not ranks:
        raise UserError(f'method.targets: {part} has no layers of "{settings.targets}"; choose "all"')
    if settings.rank > (largest := max(ranks.values())):
        raise UserError(
            f"method.rank: {settings.rank} is more than any layer of {part} has, which is {largest}; lower it to that "
            "at most"
        )
    from peft import LoraConfig, inject_adapter_in_model  # only here: a full run's plan does without it

    smaller = {name: rank for name, rank in ranks.items() if rank < settings.rank}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale * settings.rank,  # type: ignore[arg-type]  # it is divided by the rank
        lora_dropout=settings.dropout,
        target_modules="|".join(map(re.escape, ranks)),
        rank_pattern={re.escape(name): rank for name, rank in smaller.items()},
        alpha_pattern={re.escape(name): settings.scale * rank for name, rank in smaller.items()},
    )
    # peft would make a LoRA as wide as the frozen weights, and cannot make one of a plan's fake tensors: it makes the
    # shapes only, and then draws the numbers.
    with _disable_current_modes():
        inject_adapter_in_model(config, network, _NAME, low_cpu_mem_usage=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _, layer in _lora_layers(network):
            for half in (layer.lora_A, layer.lora_B):
                half[_NAME].weight = nn.Parameter(torch.empty(half[_NAME].weight.shape))
            layer.reset_lora_parameters(_NAME, init_lora_weights=True)
            if settings.init == "pissa" and isinstance(layer.get_base_layer(), nn.Linear):
                layer.pissa_init(_NAME, f"pissa_niter_{_ROUNDS}")
                layer.begun = _halves(layer)


def trainable(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Of a network's parameters those of its LoRA; all of them where it has none."""
    own = {name + half for name, _ in _lora_layers(network) for half in (_DOWN, _UP)}
    return {name: parameter for name, parameter in parameters.items() if name in own or not own}


@torch.no_grad()
def lora_of_networks(networks: Mapping[str, nn.Module]) -> Lora:
    """What the LoRA of networks, by their names in the model folder, change of the weights that those were loaded with;
    live tensors, where they begin without a change."""
    return {
        (part, plain(name)): _change(layer)
        for part, network in networks.items()
        for name, layer in _lora_layers(network)
    }


def lora_of_weights(weights: Mapping[str, Tensor], scale: float) -> Lora:
    """The same out of what `trainable` names, by the names of network and tensor, as a checkpoint has it: of one that
    began without a change."""
    downs = [name for name in weights if name.endswith(_DOWN)]
    return {
        _layer(name.removesuffix(_DOWN)): LowRank(
            down := weights[name], weights[name.removesuffix(_DOWN) + _UP], scale * len(down)
        )
        for name in downs
    }


def _layer(name: str) -> tuple[str, str]:
    part, _, layer = name.partition(".")
    return part, plain(layer)


def _change(layer: Any) -> LowRank:
    down, up = (half.detach() for half in (layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight))
    alpha = layer.lora_alpha[_NAME]
    if (begun := getattr(layer, "begun", None)) is None:
        return LowRank(down, up, alpha)
    # What it began with is in the frozen weight no more. The difference of the two products is small beside both, and
    # would be lost in float16: it is put as the product of two that are as small.
    begun_down, begun_up = (half.to(down.device) for half in begun)
    left, upper = torch.linalg.qr(torch.cat([up, -begun_up], dim=1))
    right, lower = torch.linalg.qr(torch.cat([down, begun_down]).T)
    inner_up, values, inner_down = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = values.sqrt()
    return LowRank(root[:, None] * (inner_down @ right.T), left @ inner_up * root, alpha / len(down) * len(values))


def _halves(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a LoRA as it is now."""
    return layer.lora_A[_NAME].weight.detach().clone(), layer.lora_B[_NAME].weight.detach().clone()


def _ranks(network: nn.Module, targets: str, trainable: set[str]) -> dict[str, int]:
    """The layers that are meant, and the largest rank that a change of each can have."""
    wanted = re.compile(rf"(.*\.)?({_TARGETS[targets]})")
    return {
        name: _full_rank(module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and f"{name}.weight" in trainable and wanted.fullmatch(name)
    }


def _full_rank(layer: Any) -> int:
    if isinstance(layer, nn.Conv2d):
        return min(layer.out_channels, layer.weight[0].numel())
    return min(layer.out_features, layer.in_features)  # of which a quantised weight says nothing


def is_adapted(network: nn.Module) -> bool:
    """Whether it has a LoRA."""
    return bool(getattr(network, "peft_config", None))


def _lora_layers(network: nn.Module) -> list[tuple[str, Any]]:
    if not is_adapted(network):
        return []
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer)]
