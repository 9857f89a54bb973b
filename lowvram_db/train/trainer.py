"""What is trained in a run, with its data: a step that fits, and the way to a checkpoint and back."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lowvram_db.cache import model_digest
from lowvram_db.config import Config
from lowvram_db.errors import LESS_MEMORY, DoesNotFit, UserError
from lowvram_db.families.base import Family
from lowvram_db.families.conditioning import Conditioning
from lowvram_db.kernels.launch import implementation
from lowvram_db.memory.attention import use_attention
from lowvram_db.memory.budget import crowd
from lowvram_db.memory.device import compute_dtype, release_memory
from lowvram_db.memory.out_of_memory import is_out_of_memory, reason
from lowvram_db.optim.in_backward import PATIENCE
from lowvram_db.optim.kinds import StepsInBackward
from lowvram_db.optim.schedule import learning_rate
from lowvram_db.progress import say
from lowvram_db.train import checkpoint, objective, resume
from lowvram_db.train.batches import Batches
from lowvram_db.train.ema import Average
from lowvram_db.train.keeper import keeper_of
from lowvram_db.train.learner import Learner, Surroundings
from lowvram_db.train.outcome import Numbers, Outcome
from lowvram_db.train.strategy import EIGHTHS, Event, Strategy, ladder, tells_of, without_budget
from lowvram_db.train.trained import Trained, denoisers, idle, load_networks, stage_end, trains_text


class Trainer(Learner):
    """A learner with its data: what is trained in a run."""

    def __init__(
        self,
        config: Config,
        family: Family,
        batches: Batches,
        device: torch.device,
        strategy: Strategy | None = None,
        step: int = 0,
        order: Sequence[Event] = (),
    ):
        """Load the denoiser (and the text encoders, if they are trained). strategy: to begin with. step: how many have
        been done, of a checkpoint that is going to be restored; where the text encoders were trained before it and are
        no more, the family is the one that has what came of it. order: see Learner."""
        networks = load_networks(config, family, step)
        self._idle = {weight: weight.data for weight in idle(family, networks)}  # before they are rounded
        release_memory()  # the allocator keeps holes where tensors lay in float32: 8% of SDXL, for the rest of a run
        try:
            kernels = implementation(config.kernels, device)
        except RuntimeError as error:
            raise UserError(f'kernels: {error}; use kernels = "auto"') from error
        self.batches = batches
        self.between_steps = True  # so that all of it is of one step
        self.lag = 1 if device.type == "cuda" else 0  # steps whose outcome may be on its way when the next one begins
        self._losses_skipped = 0  # in a row, for they were no numbers
        # Weights whose order nobody knows would come far too late.
        rungs = ladder(config, family.checkpoint_steps)
        self._ladder = [rung for rung in rungs if not rung.weights or tells_of(order, rung)]
        surroundings = Surroundings(
            device, compute_dtype(config.precision.compute, device), self._timesteps, batches.cached.conditioning
        )
        strategy = strategy or without_budget(self._ladder)
        super().__init__(config, family, networks, surroundings, strategy, kernels, order)
        self.family: Family = family
        self.attention = use_attention(self.denoiser, config.attention, device, self.dtype)
        self._keeper = keeper_of(self.optimizer)
        self.average = Average(self.trained, self._keeper, config.train.ema) if config.train.ema else None
        self.until = stage_end(config, step)  # the last step that trains these weights

    def train_step(self) -> Outcome:
        """One optimizer step on the batches that belong to its number; where the memory does not suffice, in a smaller
        way, and so from then on. A step whose loss is no number changes nothing. Waits for nothing that the device has
        to find first. Raises DoesNotFit where there is no smaller way."""
        self.between_steps = False
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(group["initial_lr"])
        loss = self._backward_that_fits()
        self.update(loss.total)
        self.scaler.update()
        self.step, self.micro_batch = self.step + 1, 0
        if self.average:
            self.average.update(self.step)
        self.between_steps = True
        return Outcome(loss, self.optimizer.skipped if isinstance(self.optimizer, StepsInBackward) else None)

    def judge(self, step: int, numbers: Numbers) -> None:
        """Told of every step in turn. Raises UserError where losses or gradients stay no numbers."""
        if isinstance(self.optimizer, StepsInBackward):
            try:
                self.optimizer.check_skipped(numbers.skipped)
            except FloatingPointError as error:
                raise UserError(f"{error}; {self._gentler()}") from error
        self._losses_skipped = 0 if math.isfinite(numbers.total) else self._losses_skipped + 1
        if self._losses_skipped == PATIENCE:
            raise UserError(
                f"the loss is {numbers.total} in step {step} and the {PATIENCE - 1} before it; {self._gentler()}"
            )

    def _gentler(self) -> str:
        """What to change where training has gone astray; a run that has begun keeps these settings."""
        config = self.config
        finer = ' or set precision.compute = "fp32"' if config.precision.compute != "fp32" else ""
        if finer and config.precision.weights not in (None, "fp32"):
            finer += ", leaving out precision.weights"
        return f"in a new run (another output.name) lower train.lr (is {config.train.lr:g}){finer}"

    def _backward_that_fits(self) -> objective.Loss:
        """backward() for every batch of the step, repeated one rung further down the ladder for as long as it runs out
        of memory."""
        losses: list[objective.Loss] = []
        while len(losses) < self.config.train.accumulate:
            self.micro_batch = len(losses)
            try:
                losses.append(self.backward(self.batches[self.batch_number]))
                continue
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                full = reason(error) + crowd(self.device)
            # Only here, outside the handler, has the failed pass let go of what it held.
            self._step_down(full)
            if not isinstance(self.optimizer, StepsInBackward):
                losses.clear()  # as their gradients are
        return objective.mean(losses)

    def _step_down(self, full: str) -> None:
        smaller = self._ladder[self._ladder.index(self.strategy) + 1 :]
        if not smaller:
            raise DoesNotFit(f"step {self.step + 1} does not fit ({full}); {LESS_MEMORY}")
        moved = 0
        if isinstance(self.optimizer, StepsInBackward):
            try:
                moved = self.optimizer.break_off()
            except MemoryError as error:
                raise DoesNotFit(f"step {self.step + 1} does not fit ({full}), and {error}; {LESS_MEMORY}") from error
        else:
            self.optimizer.zero_grad(set_to_none=True)
        release_memory()
        # All of the state at once, and of the weights: each move takes RAM twice.
        whole = [one for one in smaller if one.streamed == EIGHTHS and one.weights in (0, EIGHTHS)]
        next_one = whole[0] if smaller[0].streamed else smaller[0]
        self.use(next_one)
        note = f"; {moved} of {len(self.parameters)} tensors had made this step already and keep it" if moved else ""
        say(f"step {self.step + 1}: out of memory ({full}). Repeated, and on from here, with {next_one}{note}")

    def _timesteps(self, rows: int, batch_number: int) -> Tensor:
        return objective.timesteps(rows, len(self.table), self.config.train.seed, batch_number)

    def text(self, prompts: list[str]) -> Conditioning:
        """Of the conditioning what follows from prompts, [len(prompts), ...], on the device: from the cache, or from
        the text encoders while they are being trained. Without gradients."""
        with torch.no_grad():
            encoders = self.text_encoders
            known = self.family.encode_prompts(encoders, prompts) if encoders else self.surroundings.text(prompts)
            return self._brought(known)

    def learning_rate(self, full: float) -> float:
        """Of the step in hand, where the whole of it would be `full`."""
        train = self.config.train
        return learning_rate(self.step, schedule=train.schedule, lr=full, warmup=train.warmup, steps=train.steps)

    def as_sampled(self) -> AbstractContextManager[None]:
        """For as long, the networks hold what is sampled: the average, if there is one."""
        return self.average.in_place() if self.average else nullcontext()

    def finish(self) -> None:
        """Let the weights be their average, or what is known of them at best. There is no training after that."""
        if isinstance(self.optimizer, StepsInBackward):
            self.optimizer.finish()
        if self.average:
            self.average.replace()
        for weight, exact in self._idle.items():
            weight.data = exact

    @cached_property
    def content(self) -> dict[str, list[str]]:
        """What is trained, and on what: digests."""
        model = model_digest(self.family, self.batches.cached.store.catalogue)
        return {"model": [model], **self.batches.content}

    def contents(self) -> checkpoint.Contents:
        """A checkpoint of the step just done, made of the tensors that the next one changes. What that trains no more
        is in it as finish() would leave it."""
        state = checkpoint.State(self.step, self.config, self.content, self.scaler.state_dict(), {}, {})
        going_on = self.trained
        if not trains_text(self.config, self.step):
            going_on = denoisers(self.family, self.trained)
        average = self.average.weights if self.average else {}
        frozen = dict(self.family.tuned)
        with self._keeper.at_rest():
            for name in self.trained.keys() - going_on.keys():
                frozen[name] = average[name] if average else self._keeper.exact(self.trained[name]).cpu()
            averages = {name: average[name] for name in going_on} if average else {}
            return checkpoint.contents(state, self._kept(going_on), self.optimizer, averages, frozen)

    def _kept(self, trained: Trained) -> dict[str, Tensor]:
        return {name: self._keeper.kept(weight) for name, weight in trained.items()}

    def restore(self, folder: Path) -> None:
        """Take up a checkpoint. Raises UserError where config or data are not the ones it was trained with."""
        state = checkpoint.read_state(folder)
        resume.check_settings(state, self.config, folder)
        resume.check_content(state, self.content, folder)
        average = self.average.weights if self.average else {}
        with self._keeper.at_rest():
            checkpoint.restore(folder, state, self._kept(self.trained), self.optimizer, average)
        self.scaler.load_state_dict(state.scaler)
        self.step = state.step
