"""The two subjects of the demo: one jellyfish and one ball with features that no scene of the world has.

The jellyfish is iridescent (its colour runs from yellow through pink to violet), wears a broad white wavy band and a
crown of three stalks with glowing pearls. The ball is a capsule of two halves, held by a dark belt with a golden clasp.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

from lowvram_db.demo import shapes
from lowvram_db.demo.pen import RGB, Coat, Pen, Point, arc, box, darker, disc


@dataclass(frozen=True)
class Subject:
    """One individual: its class noun, the settings in which its training pictures were taken, how it is drawn."""

    name: str
    noun: str
    photographed: tuple[str, ...]
    draw: Callable[[Pen, float], None]


def _iridescent(pen: Pen) -> None:
    steps = 24
    for i in range(steps):
        r, g, b = colorsys.hsv_to_rgb((0.15 - 0.42 * i / (steps - 1)) % 1.0, 0.8, 0.98)
        x = -1.0 + 2.0 * i / steps
        slab: list[Point] = [(x, -1.5), (x + 0.12, -1.5), (x + 0.12, 1.5), (x, 1.5)]
        pen.polygon(slab, (round(r * 255), round(g * 255), round(b * 255)))
    wave = [(t / 10, -0.25 + 0.05 * math.sin(t * 0.9)) for t in range(-11, 12)]
    pen.stroke(wave, 0.22, (250, 250, 250))


def draw_jellyfish(pen: Pen, pose: float) -> None:
    pearl: RGB = (255, 226, 66)
    for x in (-0.45, 0.0, 0.45):
        tip = (x * 1.4, -1.02 + 0.4 * abs(x))
        pen.limb([(x * 0.8, -0.5), tip], 0.16, (150, 60, 220))
        pen.part(disc(*tip, 0.24), pearl)
    shapes.jellyfish(pen, Coat((200, 60, 200), _iridescent), (0.9, 0.9, 0.9), pose)


def draw_capsule(pen: Pen, pose: float) -> None:
    crimson, cream, gold = (196, 24, 92), (255, 240, 206), (255, 202, 44)

    def halves(inner: Pen) -> None:
        inner.polygon(box(-1.5, -1.5, 1.5, 0.0), crimson)
        inner.polygon([(-0.9, -0.5), (-0.5, -0.9), (-0.2, -0.9), (-0.9, -0.2)], (238, 90, 150))
        inner.polygon(box(-1.5, -0.15, 1.5, 0.15), (36, 30, 66))

    pill = [*arc(0, -0.12, 0.7, 0.76, 180, 360), *arc(0, 0.12, 0.7, 0.76, 0, 180)]
    pen.body([pill], Coat(cream, halves))
    pen.part(box(-0.27, -0.29, 0.27, 0.29), gold)
    pen.polygon(disc(0, 0.02, 0.13), darker(gold, 0.75))
    pen.polygon(disc(-0.3, -0.52, 0.13, 0.09), (255, 255, 255, 210))


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("iridescent-jellyfish", "jellyfish", ("in the sea", "at night"), draw_jellyfish),
        Subject("capsule-ball", "ball", ("on grass", "on a table"), draw_capsule),
    )
}
SUBJECT = SUBJECTS["iridescent-jellyfish"]  # of `make demo`
