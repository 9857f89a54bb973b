"""A pen that draws in an object's own coordinates, four times larger than the picture that will be kept.

The object lives in the square [-1, 1] (x to the right, y down). The pen carries it to its place: turned, mirrored,
scaled, moved. Everything is polygons and strokes, so a turned object is as crisp as an upright one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

Point = tuple[float, float]
RGB = tuple[int, int, int]
Paint = RGB | tuple[int, int, int, int]

SIZE = 64
SUPERSAMPLE = 4
CANVAS = SIZE * SUPERSAMPLE
OUTLINE = 5  # canvas pixels: a little over one pixel of the kept picture


def mix(a: RGB, b: RGB, share: float) -> RGB:
    """`a` with `share` (0 to 1) of `b` in it."""
    return (
        round(a[0] + (b[0] - a[0]) * share),
        round(a[1] + (b[1] - a[1]) * share),
        round(a[2] + (b[2] - a[2]) * share),
    )


def darker(colour: RGB, share: float = 0.35) -> RGB:
    return mix(colour, (20, 16, 34), share)


def lighter(colour: RGB, share: float = 0.35) -> RGB:
    return mix(colour, (255, 255, 255), share)


def arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float, steps: int = 24) -> list[Point]:
    """Points of an elliptic arc, angles in degrees, 0 to the right and 90 down."""
    angles = (math.radians(start + (end - start) * i / steps) for i in range(steps + 1))
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def disc(cx: float, cy: float, rx: float, ry: float | None = None) -> list[Point]:
    return arc(cx, cy, rx, rx if ry is None else ry, 0, 360, 32)


def box(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


@dataclass(frozen=True)
class Coat:
    """What covers a body: its ground colour, and what is painted over it in the body's own coordinates."""

    base: RGB
    paint: Callable[[Pen], None] = lambda pen: None


@dataclass(frozen=True)
class Stroke:
    """A line that belongs to a body: `points` and `width` in the object's coordinates."""

    points: Sequence[Point]
    width: float


def _light_field() -> tuple[Image.Image, Image.Image]:
    """Two (2*CANVAS)^2 masks, centred: shadow that grows to the lower right, and a soft light on the upper left."""
    ramp = Image.linear_gradient("L").resize((3 * CANVAS, 3 * CANVAS))
    turned = ramp.rotate(35).crop((CANVAS // 2, CANVAS // 2, CANVAS // 2 + 2 * CANVAS, CANVAS // 2 + 2 * CANVAS))
    shadow = turned.point(lambda v: max(0, min(150, (v - 120) * 3)))
    spot = Image.radial_gradient("L").resize((CANVAS, CANVAS)).point(lambda v: max(0, 120 - v))
    light = Image.new("L", (2 * CANVAS, 2 * CANVAS), 0)
    light.paste(spot, (CANVAS // 2 - CANVAS // 7, CANVAS // 2 - CANVAS // 6))
    return shadow, light


_SHADOW, _LIGHT = _light_field()


class Pen:
    """Draws on `canvas` (RGB, CANVAS x CANVAS) an object centred at (x, y) with the given radius, in canvas pixels."""

    def __init__(
        self, canvas: Image.Image, x: float, y: float, radius: float, tilt: float = 0.0, mirrored: bool = False
    ) -> None:
        self.canvas, self.x, self.y, self.radius, self.tilt, self.mirrored = canvas, x, y, radius, tilt, mirrored
        self._draw = ImageDraw.Draw(canvas, "RGBA")
        cos, sin = math.cos(math.radians(tilt)) * radius, math.sin(math.radians(tilt)) * radius
        side = -1 if mirrored else 1
        self._matrix = (cos * side, -sin, sin * side, cos)

    def place(self, points: Iterable[Point]) -> list[Point]:
        """Object coordinates to canvas pixels."""
        a, b, c, d = self._matrix
        return [(self.x + a * px + b * py, self.y + c * px + d * py) for px, py in points]

    def polygon(self, points: Iterable[Point], fill: Paint) -> None:
        self._draw.polygon(self.place(points), fill=fill)

    def stroke(self, points: Iterable[Point], width: float, fill: Paint) -> None:
        pixels = max(2, round(width * self.radius))
        self._draw.line(self.place(points), fill=fill, width=pixels, joint="curve")

    def part(self, points: Sequence[Point], fill: RGB, edge: RGB | None = None) -> None:
        """A polygon with the dark outline that all things of this world have."""
        placed = self.place(points)
        self._draw.line([*placed, placed[0], placed[1]], fill=edge or darker(fill, 0.55), width=OUTLINE, joint="curve")
        self._draw.polygon(placed, fill=fill)

    def limb(self, points: Sequence[Point], width: float, fill: RGB) -> None:
        """A stroke with an outline."""
        placed, pixels = self.place(points), max(2, round(width * self.radius))
        self._draw.line(placed, fill=darker(fill, 0.55), width=pixels + OUTLINE, joint="curve")
        self._draw.line(placed, fill=fill, width=pixels, joint="curve")

    def body(self, parts: Sequence[Sequence[Point]], coat: Coat, strokes: Sequence[Stroke] = ()) -> None:
        """Parts and strokes covered by one coat, outlined, and lit from the upper left."""
        edge, mask = darker(coat.base, 0.6), Image.new("L", self.canvas.size, 0)
        shape = ImageDraw.Draw(mask)
        for stroke in strokes:
            placed, pixels = self.place(stroke.points), max(2, round(stroke.width * self.radius))
            self._draw.line(placed, fill=edge, width=pixels + OUTLINE, joint="curve")
            shape.line(placed, fill=255, width=pixels, joint="curve")
        for part in parts:
            placed = self.place(part)
            self._draw.line([*placed, placed[0], placed[1]], fill=edge, width=OUTLINE, joint="curve")
            shape.polygon(placed, fill=255)
        cloth = Image.new("RGB", self.canvas.size, coat.base)
        coat.paint(Pen(cloth, self.x, self.y, self.radius, self.tilt, self.mirrored))
        self.canvas.paste(cloth, mask=mask)
        corner = (round(CANVAS - self.x), round(CANVAS - self.y))
        frame = (*corner, corner[0] + CANVAS, corner[1] + CANVAS)
        self.canvas.paste(darker(coat.base, 0.8), mask=ImageChops.multiply(mask, _SHADOW.crop(frame)))
        self.canvas.paste((255, 255, 255), mask=ImageChops.multiply(mask, _LIGHT.crop(frame)))
