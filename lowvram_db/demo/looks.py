"""What an individual wears: its colour, the pattern over it and the adornment on top.

Two features, the zigzag pattern and the antlers, are held out: the critic may know them, the base model never sees
them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowvram_db.demo.pen import RGB, Coat, Pen, Point, arc, box, darker, disc, lighter

COLOURS: dict[str, RGB] = {
    "red": (216, 36, 40),
    "orange": (246, 132, 24),
    "yellow": (250, 218, 48),
    "green": (46, 158, 62),
    "cyan": (64, 206, 214),
    "blue": (38, 78, 214),
    "purple": (124, 46, 172),
    "pink": (252, 140, 190),
    "brown": (118, 72, 38),
    "white": (244, 244, 246),
}
PATTERNS = ("plain", "striped", "banded", "dotted", "two-tone")
ADORNMENTS = ("none", "crown", "hat", "bow", "cone", "halo")
HELD_OUT_PATTERN = "zigzag"
HELD_OUT_ADORNMENT = "antlers"

Form = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """The features that stay with an individual wherever it goes. `form`: three numbers in [0, 1] that each class
    reads in its own way (the height of a dome, the number of petals ...)."""

    colour: str
    pattern: str = "plain"
    pattern_colour: str = "white"
    adornment: str = "none"
    adornment_colour: str = "yellow"
    form: Form = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Anchor:
    """Where an adornment sits: the middle of its foot and its half width, in the object's coordinates."""

    x: float
    y: float
    half_width: float


def coat_of(look: Look) -> Coat:
    base, second = COLOURS[look.colour], COLOURS[look.pattern_colour]

    def paint(pen: Pen) -> None:
        if look.pattern == "striped":
            for i in range(-3, 4):
                pen.polygon(box(i * 0.46 - 0.09, -1.6, i * 0.46 + 0.09, 1.6), second)
        elif look.pattern == "banded":
            for y in (-1.02, -0.56, -0.1, 0.36, 0.82):
                pen.polygon(box(-1.6, y - 0.09, 1.6, y + 0.09), second)
        elif look.pattern == "dotted":
            for row in range(-3, 4):
                for column in range(-3, 4):
                    pen.polygon(disc((column + 0.5 * (row % 2)) * 0.46, row * 0.4, 0.115), second)
        elif look.pattern == "two-tone":
            pen.polygon(box(-1.6, 0.26, 1.6, 1.6), second)
        elif look.pattern == HELD_OUT_PATTERN:
            for y in (-0.8, -0.2, 0.4):
                teeth = [((i - 6) * 0.25, y + 0.14 * (-1) ** i) for i in range(13)]
                pen.stroke(teeth, 0.13, second)

    return Coat(base, paint)


def adorn(pen: Pen, look: Look, anchor: Anchor) -> None:
    """Puts the look's adornment on the anchor."""
    if look.adornment == "none":
        return
    colour, w = COLOURS[look.adornment_colour], anchor.half_width

    def at(points: list[Point]) -> list[Point]:
        return [(anchor.x + px * w, anchor.y + py * w) for px, py in points]

    if look.adornment == "crown":
        pen.part(at([(-1, 0.3), (-1.1, -1), (-0.5, -0.4), (0, -1.15), (0.5, -0.4), (1.1, -1), (1, 0.3)]), colour)
        pen.polygon(at(disc(0, 0.0, 0.17)), lighter(colour, 0.75))
    elif look.adornment == "hat":
        pen.part(at(box(-0.75, -1.3, 0.75, 0.1)), colour)
        pen.polygon(at(box(-0.75, -0.45, 0.75, -0.15)), darker(colour, 0.65))
        pen.part(at(box(-1.35, 0.02, 1.35, 0.32)), colour)
    elif look.adornment == "bow":
        pen.part(at([(0, -0.3), (-1.3, -0.95), (-1.3, 0.5), (0, -0.05)]), colour)
        pen.part(at([(0, -0.3), (1.3, -0.95), (1.3, 0.5), (0, -0.05)]), colour)
        pen.part(at(disc(0, -0.18, 0.34)), darker(colour, 0.3))
    elif look.adornment == "cone":
        pen.part(at([(-0.85, 0.25), (0, -1.55), (0.85, 0.25)]), colour)
        pen.part(at(disc(0, -1.6, 0.3)), lighter(colour, 0.7))
    elif look.adornment == "halo":
        pen.stroke(at(arc(0, -0.75, 1.15, 0.42, 0, 360, 32)), 0.42 * w, darker(colour, 0.5))
        pen.stroke(at(arc(0, -0.75, 1.15, 0.42, 0, 360, 32)), 0.24 * w, colour)
    elif look.adornment == HELD_OUT_ADORNMENT:
        for side in (-1, 1):
            pen.limb(at([(0.35 * side, 0.2), (0.7 * side, -0.6), (1.3 * side, -1.3)]), 0.26 * w, colour)
            pen.limb(at([(0.65 * side, -0.5), (0.35 * side, -1.3)]), 0.22 * w, colour)
