"""The optimizers a run can choose, built the same way and checked once that they really work."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_db.config import Config
from lowvram_db.errors import UserError
from lowvram_db.kernels import launch
from lowvram_db.kernels.launch import Choice, Implementation
from lowvram_db.optim.adafactor import Adafactor
from lowvram_db.optim.adam8 import Adam8
from lowvram_db.optim.in_backward import InBackward
from lowvram_db.optim.placement import Placement
from lowvram_db.optim.storage import Weights
from lowvram_db.progress import say
from lowvram_db.sections import OptimizerConfig
from lowvram_db.train.keeper import keeper_of

_MIN_8_BIT_SIZE = 4096  # smaller tensors keep float32 state: their blocks are too few to matter and too small to trust


def that_runs(config: Config, device: torch.device) -> Config:
    """The config with an optimizer that works on this device: on a GPU adam8 needs Triton, without which it would take
    a minute where it takes a second.

    Where Triton does not run and the user has asked neither for adam8 nor for weights that no other can step, it is
    bnb-adam8, with weights in float32, and that is said. Raises UserError with the mend where the user has.
    """
    if device.type != "cuda" or config.optimizer.name != "adam8" or config.kernels == "torch":
        return config
    problem = launch.problem(device.type)
    if not problem:
        return config
    because = f"adam8 needs Triton on a GPU, which does not run here ({problem})"
    asked_for_weights = config.precision.weights not in (None, "fp32")
    if "name" in config.optimizer.model_fields_set or asked_for_weights or config.kernels == "triton":
        without = " and without precision.weights" if asked_for_weights else ""
        raise UserError(
            f'optimizer.name: {because}; {launch.mend()}, or go on with optimizer.name = "bnb-adam8"{without}'
        )
    say(f"{because}: going on with bnb-adam8 and float32 weights, which take more memory. The mend: {launch.mend()}")
    optimizer = config.optimizer.model_copy(update={"name": "bnb-adam8"})
    return config.model_copy(update={"optimizer": optimizer, "kernels": "torch"})


def build(
    settings: OptimizerConfig,
    groups: list[dict[str, Any]],
    *,
    weights: Weights = "fp32",
    seed: int = 0,
    micro_batches: int = 1,
    max_norm: float | None = None,
    kernels: Choice | Implementation = "auto",
    device: torch.device | None = None,
    placement: Placement | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of the settings over groups of float32 parameters.

    groups: as torch has them, "params" with their names, and each with its own "lr".
    weights, device, seed (of the rounding), micro_batches, max_norm, kernels: for those that step in backward, which
    bring the parameters there and store them so. Whoever calls another one gathers its gradients, and clips them.
    placement: of the state, for those that stream; else resident.
    """
    betas = (settings.beta1, settings.beta2)
    if settings.name == "adam8":
        return Adam8(
            groups,
            betas=betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            weights=weights,
            seed=seed,
            micro_batches=micro_batches,
            max_norm=max_norm,
            kernels=kernels,
            device=device,
            placement=placement,
        )
    if settings.name == "adafactor":
        return Adafactor(
            groups,
            weight_decay=settings.weight_decay,
            weights=weights,
            seed=seed,
            max_norm=max_norm,
            kernels=kernels,
            device=device,
        )
    plain = [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]
    if settings.name == "adamw":
        # Fused: few launches, and on the device it is read there whether a gradient overflowed.
        return torch.optim.AdamW(plain, betas=betas, eps=settings.eps, weight_decay=settings.weight_decay, fused=True)
    import bitsandbytes

    # Keywords only: bitsandbytes has removed positional parameters before, and what followed was bound wrongly.
    return bitsandbytes.optim.AdamW8bit(
        params=plain,
        betas=betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        min_8bit_size=_MIN_8_BIT_SIZE,
    )


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that torch's AdamW and bitsandbytes' else make in their first step, tensor by tensor: out of
    memory there would leave a step half done. So the first step takes what every step takes."""
    if isinstance(optimizer, InBackward):
        return
    if not isinstance(optimizer, torch.optim.AdamW):
        optimizer.check_overrides()  # type: ignore[attr-defined]  # as bitsandbytes' own step begins
        optimizer.to_gpu()  # type: ignore[attr-defined]
        optimizer.initialized = True  # type: ignore[attr-defined]
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if isinstance(optimizer, torch.optim.AdamW):
                device = parameter.device if group["fused"] else None
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
            else:
                optimizer.init_state(group, parameter, number, place)  # type: ignore[attr-defined]


class FirstStepCheck:
    """Made before the first step, asked after it: did the weights move, and is the state as small as promised?"""

    def __init__(self, settings: OptimizerConfig, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer):
        self._settings, self._optimizer, self._keeper = settings, optimizer, keeper_of(optimizer)
        self._parameters = list(parameters)
        self._before = self._first()

    def _first(self) -> list[Tensor]:
        with self._keeper.at_rest():
            return [self._keeper.kept(parameter).flatten()[:64].clone() for parameter in self._parameters]

    def verify(self) -> None:
        """Raise UserError where the optimizer did nothing or keeps another state than its name says."""
        if all(map(torch.equal, self._first(), self._before)):
            raise UserError(
                f"optimizer.name: {self._settings.name} did not change any weight in its first step; train.lr is too "
                'small, or its installation is broken on this machine: try optimizer.name = "adamw"'
            )
        if self._settings.name == "bnb-adam8":
            for parameter in self._parameters:
                state = self._optimizer.state[parameter].get("state1")
                if parameter.numel() >= _MIN_8_BIT_SIZE and state is not None and state.dtype != torch.uint8:
                    raise UserError(
                        f"optimizer.name: bitsandbytes keeps {state.dtype} state where 8 bits were asked for; "
                        'install bitsandbytes >= 0.50, or use optimizer.name = "adamw"'
                    )
