"""What a run leaves behind: the finished model, as a folder and as one file, and sheets of its pictures."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from lowvram_db.atomic import free_name, rename, replacing_file
from lowvram_db.config import Config
from lowvram_db.families.draw import Drawer
from lowvram_db.formats.export import export_run
from lowvram_db.memory.device import release_memory
from lowvram_db.methods import method_of
from lowvram_db.progress import say
from lowvram_db.run import Run
from lowvram_db.sampling import grid_of_model, sample_grid
from lowvram_db.train.loop import Trainer


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


def sample_trainer(trainer: Trainer, at_once: int, path: Path) -> None:
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
        _write_grid(trainer.config, path, partial(sample_grid, drawer, text=trainer.text))
    del drawer
    release_memory()


def sample_result(config: Config, run: Run, device: torch.device, at_once: int, begins: Callable[[str], None]) -> None:
    """The sample grid of what came of a run, drawn by what stands on the disk."""
    family = method_of(config).open(config, run)
    compute, told = config.precision.compute, stages("sampling", begins)
    draw = partial(grid_of_model, family, compute=compute, device=device, at_once=at_once, begins=told)
    _write_grid(config, run.sample_grid(config.train.steps), draw)


def stages(what: str, begins: Callable[[str], None]) -> Callable[[str], None]:
    """Tells of the stages of drawing as of the plan's phases."""
    return lambda stage: begins(f"{what}, {stage}")


def _write_grid(config: Config, path: Path, draw: Callable[..., Image.Image]) -> None:
    sample = config.sample
    grid = draw(
        prompts=[config.fill(prompt) for prompt in sample.prompts],
        guidance=sample.guidance,
        seeds=sample.seeds,
        steps=sample.steps,
        resolution=config.train.resolution,
    )
    with replacing_file(path) as temporary:
        grid.save(temporary, format="PNG")
