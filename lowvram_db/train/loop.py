"""The training loop: from cached latents to a trained denoiser."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lowvram_db.errors import Interrupted, UserError
from lowvram_db.memory.device import release_memory
from lowvram_db.memory.out_of_memory import is_out_of_memory, reason
from lowvram_db.progress import Bar, say
from lowvram_db.run import Run
from lowvram_db.sections import CheckpointConfig
from lowvram_db.train import checkpoint
from lowvram_db.train.interrupt import stop_on_request
from lowvram_db.train.journal import Journal
from lowvram_db.train.metrics import Metrics, logged
from lowvram_db.train.optimizer import FirstStepCheck
from lowvram_db.train.saving import Saver
from lowvram_db.train.trained import steps_of
from lowvram_db.train.trainer import Trainer
from lowvram_db.train.validation import Validation


def train(
    trainer: Trainer, run: Run, sample: Callable[[Path], None], begins: Callable[[str], None] = lambda phase: None
) -> None:
    """Train to the last step that trains these weights, saving and sampling on the way; `sample` draws the grid into a
    path. `begins` is told of every phase of the plan that begins.

    Raises Interrupted, after saving, when the user asks to stop; UserError as train_step does. Whatever else fails
    between two steps, the last one is saved before.
    """
    began = trainer.step
    with Saver(run, trainer.config.checkpoint.keep, trainer.device) as saver:
        try:
            _train(trainer, run, saver, sample, begins)
        except (UserError, Interrupted):
            raise
        except Exception:
            if trainer.between_steps and trainer.step > began:
                optional(partial(_save_unless_saved, trainer, run, saver), "the last step's checkpoint is")
            raise


def _save_unless_saved(trainer: Trainer, run: Run, saver: Saver) -> None:
    saver.wait()
    if trainer.step not in checkpoint.steps(run.checkpoints):
        saver.save(trainer.contents(), beside=False)


def _train(
    trainer: Trainer, run: Run, saver: Saver, sample: Callable[[Path], None], begins: Callable[[str], None]
) -> None:
    config, steps, first, saved_at = trainer.config, trainer.config.train.steps, True, time.monotonic()
    check = FirstStepCheck(config.optimizer, trainer.parameters, trainer.optimizer) if trainer.step == 0 else None
    validation = Validation(trainer, logged(run.metrics, 0))
    with (
        Metrics(run.metrics, run.tensorboard, done=trainer.step) as metrics,
        Bar("training", total=steps, done=trainer.step, unit="step") as bar,
        stop_on_request() as stop_requested,
        Journal(trainer, metrics, bar) as journal,
    ):

        def validate() -> None:
            optional(lambda: metrics.log(trainer.step, **validation.measure()), f"step {trainer.step}: validation")

        first_step, steady_step = steps_of(config, trainer.step)
        begins(first_step)
        if trainer.step == 0 and validation.due(0):
            validate()
        while trainer.step < trainer.until:
            journal.begin()
            scale = trainer.scaler.get_scale() if check else 0.0
            outcome = trainer.train_step()
            # A lower loss scale says that fp16 gradients overflowed and the optimizer did not step; nor does it step
            # where the loss is no number.
            if check and trainer.scaler.get_scale() >= scale and math.isfinite(outcome.read().total):
                check.verify()
                check = None
            journal.note(outcome)

            if first:
                begins(steady_step)
                first = False
            last, stopping = trainer.step == trainer.until, stop_requested()
            saving = last or stopping or _checkpoint_due(config.checkpoint, trainer.step, time.monotonic() - saved_at)
            sampling = trainer.step < steps and _due(trainer.step, config.sample.every)
            validating = validation.due(trainer.step)
            journal.settle(0 if saving or sampling or validating else trainer.lag)
            if validating:
                validate()
            if saving:
                saver.save(trainer.contents(), beside=not (last or stopping))
                saved_at = time.monotonic()
            if stopping and trainer.step < steps:
                raise Interrupted(
                    f"stopped after step {trainer.step} of {steps}; saved {run.checkpoint(trainer.step)}; "
                    "the same command goes on from there"
                )
            if sampling:
                begins("sampling on the way")
                optional(partial(sample, run.sample_grid(trainer.step)), f"step {trainer.step}: pictures")
                begins(steady_step)


def optional(work: Callable[[], object], what: str) -> None:
    """Do what no training may end for; where it fails, say so and go on."""
    try:
        work()
    except Exception as error:
        why = reason(error) if is_out_of_memory(error) else " ".join(str(error).split()) or type(error).__name__
        say(f"{what} left out: {why}")
    release_memory()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _checkpoint_due(settings: CheckpointConfig, step: int, seconds: float) -> bool:
    """seconds: since the last one, or since this process began to train."""
    return seconds >= 60 * settings.minutes if settings.every is None else _due(step, settings.every)
