"""The training loop: from cached latents to a trained denoiser."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowvram_db.config import Config
from lowvram_db.errors import Interrupted, UserError
from lowvram_db.families.base import Family
from lowvram_db.kernels.launch import runs_triton
from lowvram_db.kernels.noise_loss import noise_loss, noisy_latents
from lowvram_db.memory.attention import use_attention
from lowvram_db.memory.device import compute_dtype, peak_bytes
from lowvram_db.optim.adam8 import Adam8
from lowvram_db.optim.choices import FirstStepCheck, build
from lowvram_db.optim.loss_scale import LossScale
from lowvram_db.optim.schedule import learning_rate
from lowvram_db.optim.storage import DTYPES, narrowing
from lowvram_db.progress import Bar
from lowvram_db.run import Run, check_resumable
from lowvram_db.train import checkpoint, objective
from lowvram_db.train.batches import Batch, Batches
from lowvram_db.train.interrupt import stop_on_request
from lowvram_db.train.metrics import Metrics


class Trainer:
    """The trained networks, their optimizer and the number of steps done."""

    def __init__(self, config: Config, family: Family, batches: Batches, device: torch.device):
        """Load the denoiser (and the text encoder, if it is trained) onto the device, weights as the config stores
        them; with adam8, backward steps them from now on."""
        self.config, self.family, self.batches, self.device = config, family, batches, device
        self.dtype = compute_dtype(config.precision.compute, device)
        self.weights = DTYPES[config.weights]
        try:
            self.triton = runs_triton(config.kernels, device)
        except RuntimeError as error:
            raise UserError(f'kernels: {error}; use kernels = "auto"') from error
        self.table = objective.table(family.noise_schedule, config.train.min_snr_gamma).to(device)
        self.step = 0
        self.denoiser = _trainable(family.load_denoiser(narrowing(config.weights)))
        self.text_encoder = _trainable(family.load_text_encoder()) if config.train.text_encoder else None
        if config.optimizer.name != "adam8":  # which brings each weight there by itself, in its final size
            self._move_to_device()
        if config.train.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
            if self.text_encoder:
                self.text_encoder.gradient_checkpointing_enable()
        self.attention = use_attention(self.denoiser, config.attention, device, self.dtype)
        named = {f"{part}.{name}": p for part, module in self.modules.items() for name, p in module.named_parameters()}
        self.parameters = list(named.values())
        self.optimizer = build(
            config.optimizer,
            named.items(),
            config.train.lr,
            weights=config.weights,
            seed=config.train.seed,
            kernels="triton" if self.triton else "torch",
            device=device,
        )
        self._move_to_device()
        self.scaler = self._loss_scale()

    def _move_to_device(self) -> None:
        for module in self.modules.values():
            module.to(self.device)

    @property
    def modules(self) -> dict[str, Any]:
        """The networks being trained, by their names in the model folder."""
        modules = {self.family.denoiser_part: self.denoiser}
        return modules | ({"text_encoder": self.text_encoder} if self.text_encoder else {})

    def _loss_scale(self) -> LossScale | torch.amp.GradScaler:
        if not isinstance(self.optimizer, Adam8):
            return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.optimizer.attach()
        return LossScale(self.optimizer, dynamic=self.dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        """For weights that are more precise than the arithmetic."""
        # A weight is used once a forward pass: keeping its half-precision copy until the end would only cost memory.
        enabled = self.config.weights == "fp32" and self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=False)

    def train_step(self) -> objective.Loss:
        """One optimizer step on the batch that belongs to its number."""
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.forward(self.batches[self.step])
        self.scaler.scale(loss.total).backward()
        self.scaler.step(self.optimizer)
        try:
            self.scaler.update()
        except FloatingPointError as error:
            raise UserError(f"{error}; lower train.lr ({train.lr:g})") from error
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if not math.isfinite(loss.total.item()):
            raise UserError(
                f"the loss is {loss.total.item()} in step {self.step}; lower train.lr ({train.lr:g}), or use "
                f'precision.compute = "fp32" (is "{self.config.precision.compute}")'
            )
        return loss

    def forward(self, batch: Batch) -> objective.Loss:
        """The loss of one batch, with the draws that belong to the step."""
        train = self.config.train
        mean, logvar = (tensor.to(self.device) for tensor in batch.moments)
        timesteps = objective.timesteps(len(mean), len(self.table), train.seed, self.step).to(self.device)
        address = torch.tensor([train.seed, self.step], device=self.device)

        noisy = noisy_latents(mean, logvar, timesteps, self.table, address, self.triton)
        with self.autocast():
            prediction = self.family.denoise(
                self.denoiser, noisy.to(self.weights), timesteps, self.conditioning(batch.prompts).to(self.weights)
            )
        weights = objective.row_weights(len(mean), batch.instances, self.config.prior.weight).to(self.device)
        total, rows = noise_loss(prediction, mean, logvar, timesteps, self.table, address, weights, triton=self.triton)
        return objective.split(total, rows, batch.instances)

    def conditioning(self, prompts: list[str]) -> Tensor:
        """[len(prompts), tokens, width]: from the cache, or from the text encoder while it is being trained."""
        if self.text_encoder:
            return self.family.encode_prompts(self.text_encoder, prompts)
        return self.batches.cached.conditioning(prompts).to(self.device)

    def learning_rate(self) -> float:
        train = self.config.train
        return learning_rate(self.step, schedule=train.schedule, lr=train.lr, warmup=train.warmup, steps=train.steps)

    def finish(self, dtype: torch.dtype = torch.float32) -> None:
        """Bring the weights to dtype from what is known of them at best. There is no training after that."""
        if isinstance(self.optimizer, Adam8):
            self.optimizer.finish(dtype)

    def save(self, folder: Path) -> None:
        """Write a checkpoint of the step just done into `folder`."""
        state = checkpoint.State(self.step, self.config, self.batches.identity, self.scaler.state_dict(), {})
        checkpoint.save(folder, state, self.modules, self.optimizer)

    def restore(self, folder: Path) -> None:
        """Take up a checkpoint. Raises UserError where config or data are not the ones it was trained with."""
        state = checkpoint.read_state(folder)
        check_resumable(state.config, self.config, folder)
        if state.data != self.batches.identity:
            raise UserError(
                f"{folder} was trained on other photos or another model than are there now; "
                "bring them back, or start a new run with another output.name"
            )
        checkpoint.restore(folder, state, self.modules, self.optimizer)
        self.scaler.load_state_dict(state.scaler)
        self.step = state.step


def train(trainer: Trainer, run: Run, sample: Callable[[Path], None]) -> None:
    """Train to the last step, saving and sampling on the way; `sample` draws the grid into a path.

    Raises Interrupted, after saving, when the user asks to stop; UserError when the loss is no number.
    """
    config, steps = trainer.config, trainer.config.train.steps
    check = FirstStepCheck(config.optimizer, trainer.parameters) if trainer.step == 0 else None
    with (
        Metrics(run.metrics, run.tensorboard, done=trainer.step) as metrics,
        Bar("training", total=steps, done=trainer.step, unit="step") as bar,
        stop_on_request() as stop_requested,
    ):
        while trainer.step < steps:
            began, lr = time.perf_counter(), trainer.learning_rate()
            scale = trainer.scaler.get_scale() if check else 0.0
            loss = trainer.train_step()
            # A lower loss scale says that fp16 gradients overflowed and the optimizer did not step.
            if check and trainer.scaler.get_scale() >= scale:
                check.verify(trainer.optimizer)
                check = None
            peak = peak_bytes(trainer.device)
            metrics.log(
                trainer.step,
                loss=loss.total.item(),
                instance_loss=loss.instance.item(),
                prior_loss=loss.prior.item(),
                lr=lr,
                seconds=time.perf_counter() - began,
                peak_bytes=peak,
            )
            bar.advance(note=f"loss {loss.total.item():.4f}  peak {peak / 2**30:.2f} GiB")

            last, stopping = trainer.step == steps, stop_requested()
            if last or stopping or _due(trainer.step, config.checkpoint.every):
                save_checkpoint(trainer, run)
            if stopping and not last:
                raise Interrupted(
                    f"stopped after step {trainer.step} of {steps}; saved {run.checkpoint(trainer.step)}; "
                    "the same command goes on from there"
                )
            if not last and _due(trainer.step, config.sample.every):
                sample(run.sample_grid(trainer.step))


def save_checkpoint(trainer: Trainer, run: Run) -> None:
    """Save the step just done and let go of the oldest; a failure names the checkpoint that is still good."""
    good = run.latest_checkpoint()
    try:
        trainer.save(run.checkpoint(trainer.step))
    except UserError as error:
        raise UserError(f"{error}; the last good checkpoint is {good}" if good else str(error)) from error
    checkpoint.keep_last(run.checkpoints, trainer.config.checkpoint.keep)


def _trainable(module: nn.Module) -> Any:
    return module.requires_grad_().train()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
