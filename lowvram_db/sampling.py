"""Grids of pictures: prompts down, guidance scales and seeds across."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from lowvram_db.atomic import replacing_file
from lowvram_db.errors import UserError
from lowvram_db.families import open_model
from lowvram_db.families.base import NO_PROMPT, Family
from lowvram_db.families.conditioning import Conditioning, collated
from lowvram_db.families.draw import Drawer, Wanted, drawer_for
from lowvram_db.families.text import encoded
from lowvram_db.formats.reading import AS_IT_IS, Reading
from lowvram_db.memory.device import pick_device, picture_dtypes, say_emulation
from lowvram_db.progress import Bar

_GAP = 4  # pixels between cells
_INK, _PAPER = "black", "white"


def sample_grid(
    drawer: Drawer,
    prompts: list[str],
    text: Callable[[list[str]], Conditioning],
    *,
    guidance: list[float],
    seeds: int,
    steps: int,
    resolution: int,
) -> Image.Image:
    """Draw every prompt at every guidance scale with seeds 0..seeds-1 into a labelled grid, a row together.

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
    return draw_grid(rows, prompts, [f"guidance {scale:g}, seed {seed}" for seed, scale in across])


def grid_of_model(
    family: Family,
    prompts: list[str],
    compute: str,
    device: torch.device,
    *,
    at_once: int,
    begins: Callable[[str], None] = lambda stage: None,
    **how: Any,
) -> Image.Image:
    """The grid of a model on disk: its text encoders have gone before its denoiser comes."""
    dtype, _ = picture_dtypes(compute, device)
    known = dict(encoded(family, list(dict.fromkeys([*prompts, NO_PROMPT])), device, dtype))
    drawer = drawer_for(family, compute, device, at_once, begins)
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
        grid.save(temporary, format="PNG")


def parse_scales(text: str) -> list[float]:
    """ "7,11" -> [7.0, 11.0]. Raises UserError for anything but numbers from zero up."""
    try:
        scales = [float(part) for part in text.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(0 <= scale < math.inf for scale in scales):
        raise UserError(f"--guidance {text}: write numbers with commas between, for example 7,11")
    return scales


def draw_grid(rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str]) -> Image.Image:
    """Pictures of one size as a table: row labels at the left, column labels on top, wrapped to fit."""
    width, height = rows[0][0].size
    font = ImageFont.load_default(size=max(11, min(width, height) // 20))
    label_width = max(120, width // 2)
    header = _label_height(column_labels, width, font)
    row_height = max(height, _label_height(row_labels, label_width, font))
    sheet = Image.new(
        "RGB",
        (label_width + len(column_labels) * (width + _GAP), header + len(rows) * (row_height + _GAP)),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        draw.multiline_text((label_width + column * (width + _GAP), _GAP), _wrap(label, width, font), _INK, font=font)
    for row, (label, pictures) in enumerate(zip(row_labels, rows, strict=True)):
        top = header + row * (row_height + _GAP)
        draw.multiline_text((_GAP, top), _wrap(label, label_width, font), _INK, font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (label_width + column * (width + _GAP), top))
    return sheet


def _label_height(labels: list[str], width: int, font: Any) -> int:
    lines = max(_wrap(label, width, font).count("\n") + 1 for label in labels)
    return lines * (font.size + 6) + 2 * _GAP


def _wrap(text: str, width: int, font: Any) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width - 2 * _GAP and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
