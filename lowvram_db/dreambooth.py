"""One DreamBooth run from config to pictures: each stage hands a plain value to the next."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from lowvram_db.cache import Store, catalogue_of, model_digest
from lowvram_db.concept import Concept, check_folders, describe, subject_photos
from lowvram_db.concept.class_images import class_images, own_images, shared_folder
from lowvram_db.concept.identifier import told_as_json
from lowvram_db.concept.look import look, tell
from lowvram_db.config import Config
from lowvram_db.encoding import cache_folder, check_pictures, encode_all, encode_text
from lowvram_db.errors import LESS_MEMORY, DoesNotFit, Interrupted, UserError
from lowvram_db.families import check_trainable, open_model
from lowvram_db.families.base import Family
from lowvram_db.formats.tokens import read_tokens
from lowvram_db.memory import driver
from lowvram_db.memory.arithmetic import deterministic
from lowvram_db.memory.budget import budget_for, cap, crowd
from lowvram_db.memory.device import compute_dtype, pick_device, release_memory, say_emulation
from lowvram_db.memory.out_of_memory import is_out_of_memory, reason
from lowvram_db.memory.size import gib
from lowvram_db.memory.spill import Watch
from lowvram_db.memory.stream.pinning import LESS_RAM
from lowvram_db.methods import method_of
from lowvram_db.plan import make_plan
from lowvram_db.plan.meter import Meter
from lowvram_db.plan.result import Plan
from lowvram_db.plan.show import does_not_fit, summary
from lowvram_db.prediction_check import check_prediction
from lowvram_db.progress import say
from lowvram_db.report import write_report
from lowvram_db.results import (
    has_base_grid,
    sample_base,
    sample_result,
    sample_trainer,
    save_result,
    stages,
    write_single_file,
)
from lowvram_db.run import Run
from lowvram_db.train import checkpoint
from lowvram_db.train.batches import Batches
from lowvram_db.train.loop import optional, train
from lowvram_db.train.optimizer import that_runs
from lowvram_db.train.resume import check_content, check_settings, choose, whole
from lowvram_db.train.trained import trains_text
from lowvram_db.train.trainer import Trainer


def run_dreambooth(config: Config, resume: str = "auto", strict: bool = False) -> Run:
    """Train, or go on with, the run of this config; returns its folder with model/ and samples/ in it.

    resume: "auto", "never" or the path of a checkpoint. strict: whether what is odd about the photos ends it before it
    begins. Raises UserError for anything the user can mend, DoesNotFit
    when the GPU's memory is full, and Interrupted after Ctrl-C; finished work is always kept.
    """
    with _problems_named(), deterministic(config.train.deterministic):
        return _run(config, resume, strict)


def build_cache(config: Config) -> Path:
    """Do all of a run that comes before training: missing class images, then the cache; returns the cache's folder.

    Raises as run_dreambooth does.
    """
    with _problems_named():
        run, device = Run.of(config), pick_device()
        say_emulation(config.precision.compute, device)
        budget = budget_for(config.memory.vram, device)
        plan = None if budget is None else make_plan(config, budget)
        cap(budget, device)
        photos = _photos(config, run)
        with run.locked(), Store(cache_folder(config, run)) as store:
            family, _ = _open_family(config, photos, store)
            concept = _concept(config, family, photos, store, device, plan)
            release_memory()
            encode_all(config, family, store, concept, device)
    return store.folder


@contextlib.contextmanager
def _problems_named() -> Iterator[None]:
    """Ctrl-C and a full GPU in the words of the command line."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted("stopped; finished work is kept and the same command goes on from there") from stop
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        full = reason(error) + crowd(pick_device())
        raise DoesNotFit(f"memory is full ({full}); {LESS_MEMORY}") from error


def _run(config: Config, resume: str, strict: bool) -> Run:
    run, device, steps = Run.of(config), pick_device(), config.train.steps
    if device.type == "cpu" and (there := driver.version()):
        say(f"training on the CPU, though there is an NVIDIA driver ({there}): `lowvram-db doctor` tells why")
    config = that_runs(config, device)
    compute_dtype(config.precision.compute, device)  # before anything is done: the card may not have it
    say_emulation(config.precision.compute, device)
    photos = _photos(config, run)
    with run.locked():
        start = choose(run, resume)
        if start is not None:
            check_settings(checkpoint.read_state(start), config, start)
        if _finished(config, start, run, photos):
            say(f"{run.folder}: already trained for {steps} steps")
            _report(run)  # scores may have come since
            write_single_file(config, run)
            return run
        start = whole(run, start)
        if start is None:
            tell(look(photos, config.train.resolution, own_images(config)), strict)
        check_trainable(config.model.name, config.model.revision, config.model.reading)
        with Store(cache_folder(config, run)) as store:
            plan = _plan(config, device)  # from the config files alone: nothing large is downloaded before it fits
            family, identifier = _open_family(config, photos, store)
            run.save_config(config)
            optional(partial(run.save_identifier, identifier), "identifier.json")
            with _reported(run), Watch(device), Meter(plan, run, device) as meter:
                sampled = plan.sample_batch, meter.begins, plan.drawn_streamed
                if start is None:
                    check_prediction(config, family, store, photos, device, meter.begins, plan.drawn_streamed)
                concept = _concept(config, family, photos, store, device, plan, meter.begins)
                release_memory()
                if start is None or not has_base_grid(config, run):
                    draw = partial(sample_base, config, run, family, device, *sampled)
                    optional(draw, "pictures of the base model")
                while (done := _train(config, family, run, concept, store, device, start, plan, meter)) < steps:
                    start = run.checkpoint(done)  # a further stage begins as a run that goes on does
                release_memory()
                sample = partial(sample_result, config, run, device, *sampled)
                optional(sample, "pictures of the result")
            write_single_file(config, run)
    return run


@contextlib.contextmanager
def _reported(run: Run) -> Iterator[None]:
    """A page on the run once it is over, or stopped by Ctrl-C."""
    try:
        yield
    except Interrupted:
        _report(run)
        raise
    _report(run)


def _report(run: Run) -> None:
    optional(partial(write_report, run.folder), "report")


def _plan(config: Config, device: torch.device) -> Plan:
    """The plan to hold to, the allocator capped at its budget. Raises DoesNotFit."""
    budget = budget_for(config.memory.vram, device)
    plan = make_plan(config, budget)
    if plan.fits is False:
        raise DoesNotFit(does_not_fit(plan))
    cap(budget, device)
    say(f"plan: {summary(plan)}")
    _check_ram(plan, device)
    return plan


def _check_ram(plan: Plan, device: torch.device) -> None:
    """Raises DoesNotFit where the way that the plan goes would swap all the time; warns where loading may."""
    free = psutil.virtual_memory().available
    if device.type != "cuda" or free >= plan.least_ram_bytes:
        return
    if plan.strategy.streamed or plan.drawn_streamed:
        raise DoesNotFit(f"needs {gib(plan.least_ram_bytes)} of RAM, {gib(free)} are free; {LESS_RAM}")
    say(f"{gib(free)} of RAM are free, and about {gib(plan.least_ram_bytes)} are wanted; close other programs")


def _photos(config: Config, run: Run) -> list[Path]:
    """The subject's photos, found good, in a folder of their own."""
    named = Path(config.prior.images).expanduser() if config.prior.enabled and config.prior.images else None
    check_folders(Path(config.subject.photos).expanduser(), named, run.folder)
    return subject_photos(config, catalogue_of(cache_folder(config, run)).is_good)


def _open_family(config: Config, photos: list[Path], store: Store) -> tuple[Family, dict[str, Any]]:
    """The model, found fit for all prompts, captions, crops and masks of the run, and what it makes of the
    identifier."""
    family = _open(config)
    for remark in family.remarks:
        say(remark)
    place = Path(config.model.name).expanduser()
    encoders = read_tokens(str(place if place.is_file() else family.folder), config.model.reading)
    identifier = told_as_json(config.subject.identifier, encoders, config.subject.class_noun)
    say(identifier["said"])
    prompts = [*config.subject.templates, *config.sample.prompts, *config.prior.templates, config.prior.prompt]
    family.check_prompts([config.fill(prompt) for prompt in prompts])
    concept = describe(config, photos, [])
    concept.check(family)
    check_pictures(config, family, concept, store.catalogue)
    return family, identifier


def _open(config: Config) -> Family:
    return open_model(config.model.name, config.model.revision, config.model.reading)


def _finished(config: Config, start: Path | None, run: Run, photos: list[Path]) -> bool:
    """Whether there is nothing left to do. Raises UserError where it was done with another model or other photos."""
    if start is None or not method_of(config).place(run).exists() or not run.sample_grid(config.train.steps).exists():
        return False
    state = checkpoint.read_state(start)
    if state.step < config.train.steps:
        return False
    catalogue = catalogue_of(cache_folder(config, run))
    present = {"photos": [catalogue.look(photo).digest for photo in photos]}
    with contextlib.suppress(UserError):  # the model may have gone since: nothing needs it any more
        family = _open(config)
        present["model"] = [model_digest(family, catalogue)]
    check_content(state, present, start)
    return True


def _concept(
    config: Config,
    family: Family,
    photos: list[Path],
    store: Store,
    device: torch.device,
    plan: Plan | None,
    begins: Callable[[str], None] = lambda phase: None,
) -> Concept:
    """Photos, and class images where prior preservation wants them."""
    if not config.prior.enabled:
        return describe(config, photos, [])
    base = model_digest(family, store.catalogue)
    folder = Path(config.prior.images).expanduser() if config.prior.images else shared_folder(config, base)
    text = partial(encode_text, config, family, store, device)
    told = stages("class images", begins)
    at_once, streamed = (plan.prior_batch, plan.drawn_streamed) if plan else (None, False)
    made = class_images(config, family, folder, base, text, device, at_once, store.catalogue.is_good, told, streamed)
    concept = describe(config, photos, made)
    concept.check(family)
    return concept


def _train(
    config: Config,
    family: Family,
    run: Run,
    concept: Concept,
    store: Store,
    device: torch.device,
    start: Path | None,
    plan: Plan,
    meter: Meter,
) -> int:
    """Encode, and train to the last step that trains the same weights; of the run's last one write model/. Returns how
    many steps are done then."""
    release_memory()
    began_at = 0 if start is None else checkpoint.read_state(start).step
    if start is not None and config.text_encoder.train and not trains_text(config, began_at):
        family = family.with_tuned(checkpoint.frozen(start))
    cached = encode_all(config, family, store, concept, device, meter.begins, began_at)
    batches = Batches(concept, cached, config.train.batch, config.train.seed, config.train.hold_out)
    trainer = Trainer(config, family, batches, device, plan.strategy, began_at, plan.order)
    if start is not None:
        trainer.restore(start)
        say(f"going on from {start}, at step {trainer.step}")
    arithmetic = "fp32" if trainer.dtype == torch.float32 else config.precision.compute
    say(
        f"training {sum(parameter.numel() for parameter in trainer.parameters) / 1e6:.1f} M weights on {device}, "
        f"{arithmetic}, attention {trainer.attention}, optimizer {config.optimizer.name}"
    )
    train(trainer, run, partial(_look, trainer, run, plan.sample_batch), meter.begins)
    if trainer.step == config.train.steps:
        meter.begins("saving")
        save_result(trainer, run, began_at)
    return trainer.step


def _look(trainer: Trainer, run: Run, at_once: int, path: Path) -> None:
    """Pictures on the way, and a report, with or without them."""
    try:
        sample_trainer(trainer, run, at_once, path)
    finally:
        optional(partial(write_report, run.folder), f"step {trainer.step}: report")
