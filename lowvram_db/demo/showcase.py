"""Before and after, from the same noise: the base model beside models that DreamBooth made of it.

`python -m lowvram_db.demo RUN OTHER_RUN` puts the pictures that both runs have drawn into RUN/before-after.png: each of
their prompts with the base model, with RUN's and with OTHER_RUN's.
"""

from pathlib import Path

from PIL import Image

from lowvram_db.atomic import replacing_file
from lowvram_db.config import Config, load
from lowvram_db.errors import UserError
from lowvram_db.run import Run
from lowvram_db.sheet import Grid, draw_grid, read_grid

SEEDS = 2  # of those that the runs have drawn
_ENLARGED = 2


def before_after(trained: Run, other: Run) -> Path:
    """Make the grid of two finished runs on one base model and return its path. Raises UserError where their pictures
    are not there, or were not drawn for the same."""
    configs = [load(run.config) for run in (trained, other)]
    grids = {"base": _grid(trained, 0)}
    for run, config in zip((trained, other), configs, strict=True):
        grids[_described(config)] = _grid(run, config.train.steps)
    base, *tuned = grids.values()
    if not all(grid.compares_with(base) for grid in tuned):
        raise UserError(f"{trained.folder} and {other.folder}: drawn for different prompts, guidance, seeds or sizes")
    seeds = min(SEEDS, base.seeds)
    rows = [
        [_enlarged(picture) for grid in grids.values() for picture in grid.rows[row][:seeds]]
        for row in range(len(base.rows))
    ]
    labels = [f"{name}, seed {seed}" for name in grids for seed in range(seeds)]
    path = trained.folder / "before-after.png"
    with replacing_file(path) as temporary:
        draw_grid(rows, base.prompts, labels).save(temporary, format="PNG")
    return path


def _grid(run: Run, step: int) -> Grid:
    path = run.sample_grid(step)
    grid = read_grid(path) if path.exists() else None
    if grid is None:
        raise UserError(f"{path}: the run has no such pictures; train it with sample.prompts")
    return grid


def _described(config: Config) -> str:
    return "with prior" if config.prior.enabled else "no prior"


def _enlarged(picture: Image.Image) -> Image.Image:
    return picture.resize((_ENLARGED * picture.width, _ENLARGED * picture.height), Image.Resampling.LANCZOS)
