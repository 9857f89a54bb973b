"""Pictures of a model: every prompt at every guidance scale with every seed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lowvram_db.atomic import replacing_file
from lowvram_db.errors import UserError
from lowvram_db.families import open_model
from lowvram_db.families.base import NO_PROMPT, Family
from lowvram_db.families.conditioning import Conditioning, collated
from lowvram_db.families.draw import Drawer, Wanted, drawer_for
from lowvram_db.families.text import encoded
from lowvram_db.memory.device import pick_device, picture_dtypes, say_emulation
from lowvram_db.progress import Bar
from lowvram_db.reading import AS_IT_IS, Reading
from lowvram_db.sheet import Grid, save_sheet


def sample_grid(
    drawer: Drawer,
    prompts: list[str],
    text: Callable[[list[str]], Conditioning],
    *,
    guidance: list[float],
    seeds: int,
    steps: int,
    resolution: int,
) -> Grid:
    """Draw every prompt at every guidance scale with seeds 0..seeds-1, a row together.

    text: gives the text part of the conditioning of prompts, and of NO_PROMPT.
    """
    rows: list[list[Image.Image]] = []
    across = [Wanted(seed, scale) for scale in guidance for seed in range(seeds)]
    with Bar("sampling", total=len(prompts) * len(across), unit="picture") as bar:
        for prompt in prompts:
            rows.append([])
            for picture in drawer.draw(text([prompt, NO_PROMPT]), across, steps=steps, resolution=resolution):
                rows[-1].append(picture)
                bar.advance()
    return Grid(prompts, guidance, seeds, steps, rows)


def grid_of_model(
    family: Family,
    prompts: list[str],
    compute: str,
    device: torch.device,
    *,
    at_once: int,
    begins: Callable[[str], None] = lambda stage: None,
    streamed: bool = False,
    **how: Any,
) -> Grid:
    """The grid of a model on disk: its text encoders have gone before its denoiser comes. streamed: as for
    drawer_for."""
    dtype, _ = picture_dtypes(compute, device)
    known = dict(encoded(family, list(dict.fromkeys([*prompts, NO_PROMPT])), device, dtype))
    drawer = drawer_for(family, compute, device, at_once, begins, streamed)
    return sample_grid(drawer, prompts, lambda wanted: collated([known[prompt] for prompt in wanted]), **how)


def sample_model(
    model: str,
    prompts: list[str],
    out: Path,
    *,
    guidance: list[float],
    seeds: int,
    steps: int,
    resolution: int | None,
    compute: str,
    reading: Reading = AS_IT_IS,
) -> None:
    """Load a model by folder, file or hub id and write its grid to `out`. Raises UserError where `out` exists."""
    if out.exists():
        raise UserError(f"--out {out}: exists already; choose another name")
    if resolution is not None and resolution % 8:
        raise UserError(f"--resolution {resolution}: not divisible by 8")
    family, device = open_model(model, reading=reading), pick_device()
    say_emulation(compute, device)
    family.check_prompts(prompts)
    grid = grid_of_model(
        family,
        prompts,
        compute,
        device,
        at_once=len(guidance) * seeds,
        guidance=guidance,
        seeds=seeds,
        steps=steps,
        resolution=resolution or family.native_resolution,
    )
    with replacing_file(out) as temporary:
        save_sheet(temporary, {"": grid})


def parse_scales(text: str) -> list[float]:
    """ "7,11" -> [7.0, 11.0]. Raises UserError for anything but numbers from zero up."""
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(0 <= scale < math.inf for scale in scales):
        raise UserError(f"--guidance {text}: write numbers with commas between, for example 7,11")
    return scales
