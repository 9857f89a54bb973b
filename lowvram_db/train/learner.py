"""What one training step does: the networks being trained, the optimizer, and the way from a batch to new weights.

It reads no files and waits for no value, so that a plan runs the very same code on tensors that are not there.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from lowvram_db.config import Config
from lowvram_db.families.base import Architecture
from lowvram_db.families.conditioning import Conditioning, brought, collated, rows_of
from lowvram_db.kernels.launch import Implementation
from lowvram_db.kernels.noise_loss import noise_loss, noisy_latents
from lowvram_db.memory.device import lay_out, sent
from lowvram_db.memory.layers import can_ask
from lowvram_db.memory.widening import widen
from lowvram_db.optim.kinds import StepsInBackward
from lowvram_db.optim.loss_scale import LossScale
from lowvram_db.optim.placement import Placement
from lowvram_db.optim.storage import DTYPES, SMALLEST
from lowvram_db.train import objective
from lowvram_db.train.batches import Batch
from lowvram_db.train.optimizer import build, make_state
from lowvram_db.train.strategy import Event, Strategy
from lowvram_db.train.streaming import Moving, moving, placement
from lowvram_db.train.trained import groups, idle, trained


class Inputs(NamedTuple):
    """What a step reads beside the weights, all of it on the device."""

    mean: Tensor  # float32 [B, C, h, w], as logvar
    logvar: Tensor
    timesteps: Tensor  # int64 [B]
    address: Tensor  # int64 [2]: seed and step of all draws
    weights: Tensor  # float32 [B], of each row's loss
    masks: Tensor | None  # float32 [B, 1, h, w], what each latent counts; None: all of them alike
    conditioning: Conditioning  # without the text where its encoders are trained, which make it in the forward pass


@dataclass(frozen=True)
class Surroundings:
    """Where a learner is, and what it is fed beside its batches."""

    device: torch.device
    dtype: torch.dtype  # of the arithmetic
    timesteps: Callable[[int, int], Tensor]  # of so many rows of the batch of that number: int64 [rows], on the CPU
    text: Callable[[list[str]], Conditioning]  # what the text encoders said of prompts, where they are not trained
    # Where tensors have no values, and are where they have to be: gives so many bytes of the card, uint8.
    imagined: Callable[[int], Tensor] | None = None


class Learner:
    """The trained networks, their optimizer and the number of steps done."""

    def __init__(
        self,
        config: Config,
        family: Architecture,
        networks: dict[str, Any],
        surroundings: Surroundings,
        strategy: Strategy,
        kernels: Implementation,
        order: Sequence[Event] = (),
    ):
        """networks: by their names in the model folder, on the CPU; they move to the device, weights as the config
        stores them. Backward steps them from now on, where the optimizer is of that kind. order: what a step does with
        what is trained; gradients that are missing come from the last to the first. A wrong order of what is streamed
        costs time."""
        self.config, self.family, self.surroundings = config, family, surroundings
        self.device, self.dtype = surroundings.device, surroundings.dtype
        self.triton = kernels == "triton"  # for noise and loss
        stored = DTYPES[config.weights]
        self.activations = torch.float32 if self.dtype == torch.float32 else stored  # as they enter the networks
        self.table = objective.table(family.noise_schedule, config.train.min_snr_gamma).to(self.device)
        self.step = self.micro_batch = 0  # optimizer steps done, and batches of the one in hand
        self.modules = {part: network.requires_grad_(False).train() for part, network in networks.items()}
        self.denoiser: Any = self.modules[family.denoiser_part]
        self.text_encoders = {part: network for part, network in self.modules.items() if network is not self.denoiser}
        self.draws = any(map(_draws, self.modules.values()))
        self.trained = trained(family, self.modules)
        self.parameters = list(self.trained.values())
        for parameter in self.parameters:
            parameter.requires_grad_()
        if config.optimizer.kind.keeps_layout:  # before there is any state, which lies as the weights do
            for network in self.modules.values():
                lay_out(network, self.device)
        if not config.optimizer.kind.stores_weights:  # else it brings each there by itself, in its final size
            self._move_to_device()
        self.order = order
        self._recompute(strategy)
        self.strategy = strategy
        self.optimizer = build(
            config.optimizer,
            groups(config, family, self.trained),
            weights=config.weights,
            seed=config.train.seed,
            micro_batches=config.train.accumulate,
            max_norm=config.train.max_norm,
            kernels=kernels,
            device=self.device,
            placement=self._placement(strategy),
        )
        for weight in idle(family, self.modules):  # which the optimizer does not see
            weight.data = weight.data.to(stored)
        self._move_to_device()
        if self.dtype == torch.float32:
            for module in self.modules.values():
                widen(module)
        make_state(self.optimizer)
        self.scaler = self._loss_scale()

    def _move_to_device(self) -> None:
        if self.are_real:
            for module in self.modules.values():
                module.to(self.device)

    @property
    def are_real(self) -> bool:
        return self.surroundings.imagined is None

    def use(self, strategy: Strategy) -> None:
        """Trade time for memory in this way from now on. Raises DoesNotFit where the RAM it takes is not free."""
        if (strategy.streamed, strategy.weights) != (self.strategy.streamed, self.strategy.weights):
            assert isinstance(self.optimizer, StepsInBackward)
            self.optimizer.place(self._placement(strategy))
        self._recompute(strategy)
        self.strategy = strategy

    @property
    def events(self) -> list[tuple[nn.Parameter, bool]]:
        """What a step does with larger tensors, as schedule.uses_of_a_step takes it."""
        count = len(self.parameters)  # fewer than the order tells of where text encoders are trained no more
        known = [(self.parameters[event.place], event.reads) for event in self.order if event.place < count]
        missing = dict.fromkeys(reversed(self.parameters)).keys() - {p for p, is_read in known if not is_read}
        rest = [(p, False) for p in reversed(self.parameters) if p in missing]
        return [(p, is_read) for p, is_read in [*known, *rest] if p.numel() >= SMALLEST]

    @cached_property
    def lendable(self) -> dict[nn.Parameter, nn.Module]:
        """Those layers whose weights can live elsewhere, by their weights."""
        layers: list[Any] = [
            layer for network in self.modules.values() for layer in network.modules() if can_ask(layer)
        ]
        trained = set(self.parameters)
        return {layer.weight: layer for layer in layers if layer.weight in trained and layer.weight.numel() >= SMALLEST}

    def _placement(self, strategy: Strategy) -> Placement:
        """Where a strategy has weights and the optimizer's state."""
        return placement(self.moving(strategy), self.device, self.surroundings.imagined)

    def moving(self, strategy: Strategy) -> Moving:
        """What a strategy moves through the card."""
        return moving(strategy, self.events, self.lendable, self.config.weights)

    def _recompute(self, strategy: Strategy) -> None:
        self.denoiser.enable_gradient_checkpointing(_recomputing(self.denoiser))
        for block in self.family.checkpoint_blocks(self.denoiser)[strategy.checkpointed :]:
            for module in block.modules():
                if hasattr(module, "gradient_checkpointing"):
                    vars(module)["gradient_checkpointing"] = False
        for encoder in self.text_encoders.values():
            if strategy.checkpointed:
                encoder.gradient_checkpointing_enable(_how(encoder))
            else:
                encoder.gradient_checkpointing_disable()

    def _loss_scale(self) -> LossScale | torch.amp.GradScaler:
        # Also where fp16 is computed in float32: gradients are stored in fp16, and a checkpoint may go on elsewhere.
        scaled = self.config.precision.compute == "fp16"
        if not isinstance(self.optimizer, StepsInBackward):
            # torch's own asks after every backward whether a gradient overflowed; it holds two numbers.
            return torch.amp.GradScaler(self.device.type, enabled=scaled and self.are_real)
        self.optimizer.attach()
        return LossScale(self.optimizer, dynamic=scaled)

    def autocast(self) -> torch.autocast:
        """For weights that are more precise than the arithmetic."""
        # A weight is used once a forward pass: keeping its half-precision copy until the end would only cost memory.
        enabled = self.config.weights == "fp32" and self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=False)

    @property
    def batch_number(self) -> int:
        """Of the batch in hand, counted from the first step on: to this its draws belong."""
        return self.step * self.config.train.accumulate + self.micro_batch

    def backward(self, batch: Batch) -> objective.Loss:
        """The loss of a batch and its gradients, added to those of the batches before it in the step; with adam8 they
        have gone into the moments then, and the last of them has moved the weights."""
        steps_in_backward = isinstance(self.optimizer, StepsInBackward)
        share = 1.0 if steps_in_backward else 1 / self.config.train.accumulate
        inputs = self.inputs(batch)
        size = len(inputs.mean) // self.strategy.parts
        totals, rows = [], []
        if self.draws:  # by the step, as everything else that is drawn
            torch.manual_seed(zlib.crc32(f"{self.config.train.seed} {self.batch_number}".encode()))
        for first in range(0, len(inputs.mean), size):
            total, losses = self.forward(inputs, batch.prompts, slice(first, first + size))
            self.scaler.scale(total * share).backward()
            totals.append(total.detach())
            rows.append(losses)
        if steps_in_backward and self.micro_batch < self.config.train.accumulate - 1:
            self.optimizer.step()
        return objective.split(torch.stack(totals).sum(), torch.cat(rows), batch.instances)

    def inputs(self, batch: Batch) -> Inputs:
        """What the step in hand reads. Made whole before its first kernel is launched: a copy in the middle of a step
        would wait for the device, and the device then for whatever comes after it."""
        rows = len(batch.moments.mean)
        weights = objective.row_weights(rows, batch.instances, self.config.prior.weight)
        address = torch.tensor([self.config.train.seed, self.batch_number])
        given = (*batch.moments, self.surroundings.timesteps(rows, self.batch_number), address, weights)
        mean, logvar, timesteps, address, weights = (sent(tensor, self.device) for tensor in given)
        told = collated([self.family.view_conditioning(view) for view in batch.views])
        if not self.text_encoders:
            told |= self.surroundings.text(batch.prompts)
        masks = None if batch.masks is None else sent(batch.masks, self.device)
        return Inputs(mean, logvar, timesteps, address, weights, masks, self._brought(told))

    def _brought(self, conditioning: Conditioning) -> Conditioning:
        return brought(conditioning, self.device, self.activations)

    def forward(self, inputs: Inputs, prompts: list[str], part: slice) -> tuple[Tensor, Tensor]:
        """What the rows in `part` add to the loss, and the loss of each, with the draws that belong to the step."""
        mean, logvar, timesteps, address, weights, masks, told = inputs
        noisy = noisy_latents(mean, logvar, timesteps, self.table, address, self.triton)[part]
        told = rows_of(told, part)
        with self.autocast():
            if self.text_encoders:
                told |= self._brought(self.family.encode_prompts(self.text_encoders, prompts[part]))
            prediction = self.family.denoise(self.denoiser, noisy.to(self.activations), timesteps[part], told)
        # A draw belongs to a row's number in the whole batch: the other rows stand in with a weight of zero.
        before, after = part.start, len(mean) - part.start - len(prediction)
        if before or after:
            prediction = pad(prediction, (0, 0, 0, 0, 0, 0, before, after))
            weights = pad(weights[part], (before, after))
        total, rows = noise_loss(
            prediction, mean, logvar, timesteps, self.table, address, weights, masks, triton=self.triton
        )
        return total, rows[part]

    def update(self, loss: Tensor) -> None:
        """End the step: move the weights that backward has not moved yet, and let the gradients go. A loss that is no
        number changes nothing."""
        self._clip()
        if self.scaler.is_enabled():  # which looks at every gradient
            self.scaler.step(self.optimizer)
        elif getattr(self.optimizer, "_step_supports_amp_scaling", False):
            # As a GradScaler tells torch's fused optimizers, which then read it on the device.
            self.optimizer.found_inf = (~loss.isfinite()).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        elif self._is_number(loss):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _clip(self) -> None:
        if self.config.train.max_norm is None or isinstance(self.optimizer, StepsInBackward):  # which does so by itself
            return
        if isinstance(self.scaler, torch.amp.GradScaler):
            self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.config.train.max_norm)

    def _is_number(self, loss: Tensor) -> bool:
        """Waits for the device, as bitsandbytes does after every tensor."""
        return not self.are_real or bool(loss.isfinite())


def _how(network: nn.Module) -> dict[str, Any]:
    """How to checkpoint a network. Where it draws nothing, no state of a generator has to be fetched from the device
    for every block, to draw the same again."""
    return {"use_reentrant": False, "preserve_rng_state": _draws(network)}


def _draws(network: Any) -> bool:
    """Whether its forward pass does: by dropout, which is functional in CLIP's text encoder."""
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())
    return drops or getattr(network.config, "attention_dropout", 0) > 0


def _recomputing(network: nn.Module) -> Any:
    return partial(checkpoint, **_how(network))
