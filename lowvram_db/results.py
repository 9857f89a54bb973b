"""What a run leaves behind: the finished model, as a folder and as one file, and sheets of its pictures."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from lowvram_db.atomic import free_name, rename, replacing_file
from lowvram_db.config import Config
from lowvram_db.errors import UserError
from lowvram_db.families.base import Family
from lowvram_db.families.draw import Drawer
from lowvram_db.formats.export import export_run
from lowvram_db.memory.device import release_memory
from lowvram_db.methods import method_of
from lowvram_db.progress import say
from lowvram_db.run import Run
from lowvram_db.sampling import grid_of_model, sample_grid
from lowvram_db.sheet import Grid, read_grid, save_sheet
from lowvram_db.train.trainer import Trainer

_BASE = "base model"


def save_result(trainer: Trainer, run: Run, began_at: int) -> None:
    """What the last step has left; what an earlier, shorter training left there moves aside."""
    method = method_of(trainer.config)
    place = method.place(run)
    if place.exists():
        if began_at == trainer.step:
            return  # it is this step's own: only its pictures are missing
        rename(place, free_name(place.with_stem(f"{place.stem}-before-step-{trainer.step:06d}")))
    release_memory()
    trainer.finish()
    release_memory()
    method.write(trainer, run)


def write_single_file(config: Config, run: Run) -> None:
    """The finished model as one file, where that is wished for and not there yet."""
    path = run.single_file(config.train.steps)
    if config.output.single_file and not path.exists():
        export_run(config, run, path)
        say(f"single file: {path}")


def sample_base(
    config: Config,
    run: Run,
    family: Family,
    device: torch.device,
    at_once: int,
    begins: Callable[[str], None],
    streamed: bool = False,
) -> None:
    """The sample grid of the base model, as of step 0: it stands above all that follow. streamed: as for
    drawer_for."""
    draw = _of_model(config, family, device, at_once, begins, streamed)
    _write_sheet(run.sample_grid(0), None, _BASE, _drawn(config, draw))


def has_base_grid(config: Config, run: Run) -> bool:
    """Whether it is there, and was drawn for what is asked for now."""
    base, sample, side = _base_grid(run), config.sample, config.train.resolution
    prompts = [config.fill(prompt) for prompt in sample.prompts]
    asked_for = Grid(prompts, sample.guidance, sample.seeds, sample.steps, [[Image.new("RGB", (side, side))]])
    return base is not None and base.compares_with(asked_for)


def sample_trainer(trainer: Trainer, run: Run, at_once: int, path: Path) -> None:
    """The sample grid of a model in training: its own networks, the cached conditioning, a VAE for the moment."""
    drawer = Drawer(
        trainer.family,
        trainer.denoiser,
        trainer.device,
        trainer.activations,
        at_once,
        decoding=trainer.dtype,
        autocast=trainer.autocast,
    )
    with trainer.as_sampled():
        grid = _drawn(trainer.config, partial(sample_grid, drawer, text=trainer.text))
    _write_sheet(path, _base_grid(run), f"step {trainer.step}", grid)
    del drawer
    release_memory()


def sample_result(
    config: Config, run: Run, device: torch.device, at_once: int, begins: Callable[[str], None], streamed: bool = False
) -> None:
    """The sample grid of what came of a run, drawn by what stands on the disk. streamed: as for drawer_for."""
    draw = _of_model(config, method_of(config).open(config, run), device, at_once, begins, streamed)
    steps = config.train.steps
    _write_sheet(run.sample_grid(steps), _base_grid(run), f"step {steps}", _drawn(config, draw))


def stages(what: str, begins: Callable[[str], None]) -> Callable[[str], None]:
    """Tells of the stages of drawing as of the plan's phases."""
    return lambda stage: begins(f"{what}, {stage}")


def _of_model(
    config: Config, family: Family, device: torch.device, at_once: int, begins: Callable[[str], None], streamed: bool
) -> Callable[..., Grid]:
    compute, told = config.precision.compute, stages("sampling", begins)
    draw = partial(grid_of_model, family, compute=compute, device=device, begins=told)
    return partial(draw, at_once=at_once, streamed=streamed)


def _drawn(config: Config, draw: Callable[..., Grid]) -> Grid:
    sample = config.sample
    return draw(
        prompts=[config.fill(prompt) for prompt in sample.prompts],
        guidance=sample.guidance,
        seeds=sample.seeds,
        steps=sample.steps,
        resolution=config.train.resolution,
    )


def _write_sheet(path: Path, base: Grid | None, model: str, grid: Grid) -> None:
    above = {_BASE: base} if base is not None and base.compares_with(grid) else {}
    with replacing_file(path) as temporary:
        save_sheet(temporary, {**above, model: grid})


def _base_grid(run: Run) -> Grid | None:
    with contextlib.suppress(UserError):  # it is only shown for comparison
        return read_grid(run.sample_grid(0)) if run.sample_grid(0).exists() else None
    return None
