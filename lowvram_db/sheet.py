"""Labelled sheets of pictures, as PNG files that tell which picture lies where.

A sheet of a run shows, for every prompt, the base model's pictures and below them those of the step, from the same
noise; the PNG's text "lowvram-db" describes the latter, so that they can be taken out again one by one.
"""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from lowvram_db.errors import UserError

_GAP = 4  # pixels between cells
_INK, _PAPER = "black", "white"
_TEXT = "lowvram-db"  # the PNG's text chunk


class Drawn(NamedTuple):
    """What a picture was drawn for; the seed gives its noise."""

    prompt: str
    guidance: float
    seed: int


@dataclass(frozen=True)
class Grid:
    """A model's pictures, all of one size."""

    prompts: list[str]
    guidance: list[float]
    seeds: int  # 0, 1, ...
    steps: int  # of sampling
    rows: list[list[Image.Image]]  # by prompt; in each all seeds of the first guidance scale, then of the next

    @property
    def pictures(self) -> dict[Drawn, Image.Image]:
        """By what they were drawn for, in the order of the sheet."""
        drawn = (Drawn(*each) for each in product(self.prompts, self.guidance, range(self.seeds)))
        return dict(zip(drawn, (picture for row in self.rows for picture in row), strict=True))

    def compares_with(self, other: "Grid") -> bool:
        """Whether the pictures of both differ by nothing but the model."""
        return self._asked_for() == other._asked_for()

    def _asked_for(self) -> tuple[Any, ...]:
        return self.prompts, self.guidance, self.seeds, self.steps, self.rows[0][0].size


def save_sheet(path: Path, grids: dict[str, Grid]) -> None:
    """Write the grids of several models, by their names, as PNG: they compare with each other, and the last is the one
    that read_grid gives back."""
    grid = list(grids.values())[-1]
    rows = [each.rows[row] for row in range(len(grid.prompts)) for each in grids.values()]
    row_labels = [f"{model}: {prompt}" if model else prompt for prompt in grid.prompts for model in grids]
    column_labels = [f"guidance {scale:g}, seed {seed}" for scale in grid.guidance for seed in range(grid.seeds)]
    layout = _Layout(rows, row_labels, column_labels)
    last_rows = range(len(grids) - 1, len(rows), len(grids))
    described = {
        "prompts": grid.prompts,
        "guidance": grid.guidance,
        "seeds": grid.seeds,
        "steps": grid.steps,
        "size": grid.rows[0][0].size,
        "places": [[layout.place(row, column) for column in range(len(column_labels))] for row in last_rows],
    }
    text = PngInfo()
    text.add_text(_TEXT, json.dumps(described))
    draw_grid(rows, row_labels, column_labels).save(path, format="PNG", pnginfo=text)


def read_grid(path: Path) -> Grid | None:
    """The grid on a sheet; None where the file tells of none, as older ones do. Raises UserError where it cannot be
    read."""
    try:
        with Image.open(path) as opened:
            opened.load()
            told = getattr(opened, "text", {}).get(_TEXT)
            return None if told is None else _cut_out(opened.convert("RGB"), json.loads(told))
    except Exception as error:  # Pillow's decoders report damage as nearly any
        raise UserError(f"{path}: no sheet of pictures that can be read ({error}); remove it") from error


def _cut_out(sheet: Image.Image, told: dict[str, Any]) -> Grid:
    width, height = told["size"]
    if {len(row) for row in told["places"]} != {len(told["guidance"]) * told["seeds"]}:
        raise ValueError("it tells of other pictures than it has")
    rows = [[(left, top, left + width, top + height) for left, top in row] for row in told["places"]]
    for left, top, right, bottom in (box for row in rows for box in row):
        if not (0 <= left < right <= sheet.width and 0 <= top < bottom <= sheet.height):
            raise ValueError("a picture lies outside")
    return Grid(
        [str(prompt) for prompt in told["prompts"]],
        [float(scale) for scale in told["guidance"]],
        int(told["seeds"]),
        int(told["steps"]),
        [[sheet.crop(box) for box in row] for _, row in zip(told["prompts"], rows, strict=True)],
    )


def draw_grid(rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str]) -> Image.Image:
    """Pictures of one size as a table: row labels at the left, column labels on top, wrapped to fit."""
    layout = _Layout(rows, row_labels, column_labels)
    sheet = Image.new("RGB", layout.size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        draw.multiline_text(
            (layout.left(column), _GAP), _wrap(label, layout.width, layout.font), _INK, font=layout.font
        )
    for row, (label, pictures) in enumerate(zip(row_labels, rows, strict=True)):
        draw.multiline_text(
            (_GAP, layout.top(row)), _wrap(label, layout.label_width, layout.font), _INK, font=layout.font
        )
        for column, picture in enumerate(pictures):
            sheet.paste(picture, layout.place(row, column))
    return sheet


class _Layout:
    """Where on a sheet everything is, in pixels."""

    def __init__(self, rows: list[list[Image.Image]], row_labels: list[str], column_labels: list[str]):
        self.width, height = rows[0][0].size
        self.font: Any = ImageFont.load_default(size=max(11, min(self.width, height) // 20))
        self.label_width = max(120, self.width // 2)
        self._header = _label_height(column_labels, self.width, self.font)
        self._row_height = max(height, _label_height(row_labels, self.label_width, self.font))
        self.size = self.left(len(column_labels)), self.top(len(rows))

    def left(self, column: int) -> int:
        return self.label_width + column * (self.width + _GAP)

    def top(self, row: int) -> int:
        return self._header + row * (self._row_height + _GAP)

    def place(self, row: int, column: int) -> tuple[int, int]:
        return self.left(column), self.top(row)


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
