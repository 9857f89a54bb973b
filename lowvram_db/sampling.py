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
from lowvram_db.families.draw import Drawer, pipeline_for
from lowvram_db.formats.reading import AS_IT_IS, Reading
from lowvram_db.memory.device import pick_device
from lowvram_db.progress import Bar

_GAP = 4  # pixels between cells
_INK, _PAPER = "black", "white"


def sample_grid(
    pipeline: Any,
    prompts: list[str],
    *,
    guidance: list[float],
    seeds: int,
    steps: int,
    resolution: int,
    at_once: int | None = None,
    inputs: Callable[[str], dict[str, Any]] = lambda prompt: {"prompt": prompt},
    wider: torch.dtype | None = None,
) -> Image.Image:
    """Draw every prompt at every guidance scale with seeds 0..seeds-1 into a labelled grid.

    pipeline: a diffusers text-to-image pipeline on its device. A seed gives the same starting noise on every device.
    at_once: how many of a prompt's and scale's pictures are made together; all of them where it is not said.
    inputs: what to hand the pipeline for a prompt; the prompt itself, or embeddings where it has no text encoder.
    wider: as for draw().
    """
    drawer = Drawer(pipeline, at_once or seeds, wider)
    rows: list[list[Image.Image]] = []
    with Bar("sampling", total=len(prompts) * len(guidance) * seeds, unit="picture") as bar:
        for prompt in prompts:
            rows.append([])
            for scale in guidance:
                for picture in drawer.draw(
                    list(range(seeds)),
                    **inputs(prompt),
                    guidance_scale=scale,
                    num_inference_steps=steps,
                    height=resolution,
                    width=resolution,
                ):
                    rows[-1].append(picture)
                    bar.advance()
    return draw_grid(rows, prompts, [f"guidance {scale:g}, seed {seed}" for scale in guidance for seed in range(seeds)])


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
    family.check_prompts(prompts)
    pipeline, wider = pipeline_for(family, compute, device)
    grid = sample_grid(
        pipeline,
        prompts,
        guidance=guidance,
        seeds=seeds,
        steps=steps,
        resolution=resolution or family.native_resolution,
        wider=wider,
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
