"""What one training step does: the networks being trained, the optimizer, and the way from a batch to new weights.

It reads no files and waits for no value, so that a plan runs the very same code on tensors that are not there.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowvram_db.config import Config
from lowvram_db.families.base import Architecture
from lowvram_db.kernels.noise_loss import noise_loss, noisy_latents
from lowvram_db.memory.device import compute_dtype
from lowvram_db.optim.choices import build, make_state
from lowvram_db.optim.kinds import StepsInBackward
from lowvram_db.optim.loss_scale import LossScale
from lowvram_db.optim.storage import DTYPES
from lowvram_db.train import objective
from lowvram_db.train.batches import Batch
from lowvram_db.train.strategy import Strategy


class Learner(ABC):
    """The trained networks, their optimizer and the number of steps done."""

    def __init__(
        self,
        config: Config,
        family: Architecture,
        networks: dict[str, Any],
        device: torch.device,
        strategy: Strategy,
        triton: bool,
    ):
        """networks: by their names in the model folder, on the CPU; they move to the device, weights as the config
        stores them. With adam8, backward steps them from now on."""
        self.config, self.family, self.device, self.triton = config, family, device, triton
        self.dtype = compute_dtype(config.precision.compute, device)
        self.weights = DTYPES[config.weights]
        self.table = objective.table(family.noise_schedule, config.train.min_snr_gamma).to(device)
        self.step = 0
        self.modules = {name: network.requires_grad_().train() for name, network in networks.items()}
        self.denoiser: Any = self.modules[family.denoiser_part]
        self.text_encoder: Any = self.modules.get("text_encoder")
        if not config.optimizer.kind.stores_weights:  # else it brings each there by itself, in its final size
            self._move_to_device()
        self.use(strategy)
        named = {f"{part}.{name}": p for part, module in self.modules.items() for name, p in module.named_parameters()}
        self.parameters = list(named.values())
        self.optimizer = build(
            config.optimizer,
            named.items(),
            config.train.lr,
            weights=config.weights,
            seed=config.train.seed,
            kernels="triton" if triton else "torch",
            device=device,
        )
        self._move_to_device()
        make_state(self.optimizer)
        self.scaler = self._loss_scale()

    def _move_to_device(self) -> None:
        for module in self.modules.values():
            module.to(self.device)

    def use(self, strategy: Strategy) -> None:
        """Trade time for memory in this way from now on."""
        self.strategy = strategy
        self.denoiser.enable_gradient_checkpointing()
        for block in self.family.checkpoint_blocks(self.denoiser)[strategy.checkpointed :]:
            for module in block.modules():
                if hasattr(module, "gradient_checkpointing"):
                    vars(module)["gradient_checkpointing"] = False
        if self.text_encoder and strategy.checkpointed:
            self.text_encoder.gradient_checkpointing_enable()
        elif self.text_encoder:
            self.text_encoder.gradient_checkpointing_disable()

    def _loss_scale(self) -> LossScale | torch.amp.GradScaler:
        if not isinstance(self.optimizer, StepsInBackward):
            return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.optimizer.attach()
        return LossScale(self.optimizer, dynamic=self.dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        """For weights that are more precise than the arithmetic."""
        # A weight is used once a forward pass: keeping its half-precision copy until the end would only cost memory.
        enabled = self.config.weights == "fp32" and self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=False)

    @abstractmethod
    def conditioning(self, prompts: list[str]) -> Tensor:
        """What the denoiser wants to know of the prompts, [len(prompts), ...]."""

    @abstractmethod
    def timesteps(self, rows: int) -> Tensor:
        """Each row's timestep in this step, int64 [rows]."""

    def backward(self, batch: Batch) -> objective.Loss:
        """The loss of a batch and its gradients; with adam8 the weights have moved then."""
        size = len(batch.moments.mean) // self.strategy.parts
        totals, rows = [], []
        for first in range(0, len(batch.moments.mean), size):
            total, losses = self.forward(batch, slice(first, first + size))
            self.scaler.scale(total).backward()
            totals.append(total.detach())
            rows.append(losses)
        return objective.split(torch.stack(totals).sum(), torch.cat(rows), batch.instances)

    def forward(self, batch: Batch, part: slice) -> tuple[Tensor, Tensor]:
        """What the rows in `part` add to the loss, and the loss of each, with the draws that belong to the step."""
        train = self.config.train
        mean, logvar = (tensor.to(self.device) for tensor in batch.moments)
        timesteps = self.timesteps(len(mean)).to(self.device)
        address = torch.tensor([train.seed, self.step], device=self.device)

        noisy = noisy_latents(mean, logvar, timesteps, self.table, address, self.triton)[part]
        with self.autocast():
            prediction = self.family.denoise(
                self.denoiser,
                noisy.to(self.weights),
                timesteps[part],
                self.conditioning(batch.prompts[part]).to(self.weights),
            )
        # A draw belongs to a row's number in the whole batch: the other rows stand in with a weight of zero.
        before, after = part.start, len(mean) - part.start - len(prediction)
        inside = torch.zeros(len(mean)).index_fill_(0, torch.arange(len(mean))[part], 1.0)
        weights = objective.row_weights(len(mean), batch.instances, self.config.prior.weight) * inside
        prediction = pad(prediction, (0, 0, 0, 0, 0, 0, before, after)) if before or after else prediction
        total, rows = noise_loss(
            prediction, mean, logvar, timesteps, self.table, address, weights.to(self.device), triton=self.triton
        )
        return total, rows[part]

    def update(self, number: bool = True) -> None:
        """Step the weights that backward has not stepped yet, and let the gradients go.

        number: whether the loss was one. Where no scaler looks at every gradient, an optimizer would take one that is
        none into the weights for good.
        """
        if number or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
