"""The twelve kinds of things of the world. Each function draws one and says where an adornment sits on it.

`form` belongs to the individual and never changes; `pose` (0 to 1) changes from picture to picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from lowvram_db.demo.looks import Anchor, Form
from lowvram_db.demo.pen import RGB, Coat, Pen, Point, Stroke, arc, box, darker, disc, lighter

INK: RGB = (34, 28, 44)
WHITE: RGB = (250, 250, 250)
GLASS: RGB = (176, 222, 244)
WOOD: RGB = (112, 74, 44)
STEEL: RGB = (150, 156, 170)
LEAF: RGB = (70, 150, 60)

Shape = Callable[[Pen, Coat, Form, float], Anchor]


def _eye(pen: Pen, x: float, y: float, r: float) -> None:
    pen.polygon(disc(x, y, r), WHITE)
    pen.polygon(disc(x + 0.2 * r, y + 0.15 * r, 0.6 * r), INK)


def jellyfish(pen: Pen, coat: Coat, form: Form, pose: float) -> Anchor:
    top, legs, width = -0.6 - 0.16 * form[0], 4 + round(2 * form[1]), 0.74 + 0.14 * form[2]
    swing = 2 * math.pi * pose
    strokes = []
    for i in range(legs):
        x = width * 0.8 * (2 * i / (legs - 1) - 1)
        wave = [(x * (1 - 0.1 * t / 8) + 0.1 * math.sin(0.85 * t + swing + i), 0.1 + 0.11 * t) for t in range(9)]
        strokes.append(Stroke(wave, 0.13))
    hem: list[Point] = []
    for i in range(6):  # a scalloped hem, from right to left
        hem += arc(width * (1 - (2 * i + 1) / 6), 0.12, width / 6, 0.12, 0, 180, 5)
    pen.body([], coat, strokes)
    pen.body([[*arc(0, 0.12, width, 0.12 - top, 180, 360), *hem]], coat)
    _eye(pen, -0.26, -0.1, 0.13)
    _eye(pen, 0.26, -0.1, 0.13)
    return Anchor(0, top, 0.3)


def ball(pen: Pen, coat: Coat, form: Form, pose: float) -> Anchor:
    r, roll = 0.78, (pose - 0.5) * 0.12
    pen.body([disc(0, 0, r)], coat)
    seam = (*darker(coat.base, 0.55), 190)
    pen.stroke(arc(-1.0 + roll, 0, 0.62, 0.9, -40, 40), 0.06, seam)
    pen.stroke(arc(1.0 + roll, 0, 0.62, 0.9, 140, 220), 0.06, seam)
    pen.polygon(disc(-0.3, -0.38, 0.17, 0.11), (255, 255, 255, 210))
    return Anchor(0, -r + 0.03, 0.28)


def fish(pen: Pen, coat: Coat, form: Form, pose: float) -> Anchor:
    height, wag = 0.42 + 0.14 * form[0], 0.16 * math.sin(2 * math.pi * pose)
    tail = [(0.5, 0.0), (0.98, -0.48 + wag), (0.84, wag), (0.98, 0.48 + wag)]
    fin = [(-0.25, -height * 0.85), (0.1 + 0.2 * form[1], -height - 0.28), (0.4, -height * 0.6)]
    belly = [(-0.1, height * 0.85), (0.18, height + 0.24), (0.3, height * 0.7)]
    pen.body([tail, fin, belly], Coat(darker(coat.base, 0.22)))
    pen.body([disc(-0.15, 0, 0.75, height)], coat)
    pen.stroke(arc(-0.62, 0, 0.26, height * 0.7, -60, 60), 0.06, darker(coat.base, 0.5))
    _eye(pen, -0.62, -0.12, 0.14)
    pen.stroke(arc(-0.86, 0.12, 0.14, 0.1, 20, 120), 0.05, INK)
    return Anchor(-0.36, -height * 0.93, 0.24)


def mug(pen: Pen, coat: Coat, form: Form, pose: float) -> Anchor:
    top, half, foot = -0.5 - 0.14 * form[0], 0.52 + 0.1 * form[1], 0.42 + 0.14 * form[2]
    handle = arc(half - 0.06, 0.12, 0.42, 0.36, -90, 90)
    pen.limb(handle, 0.17, coat.base)
    side = [(-half, top), (half, top), (foot, 0.78), *arc(0, 0.78, foot, 0.1, 0, 180), (-foot, 0.78)]
    pen.body([side], coat)
    pen.part(disc(0, top, half, 0.17), lighter(coat.base, 0.45), darker(coat.base, 0.55))
    pen.polygon(disc(0, top + 0.03, half * 0.78, 0.1), (84, 48, 26))
    for x in (-0.16, 0.14):
        steam = [(x + 0.07 * math.sin(t + 6 * pose), top - 0.14 - 0.09 * t) for t in range(5)]
        pen.stroke(steam, 0.07, (255, 255, 255, 150))
    return Anchor(0, top - 0.1, 0.28)


def house(pen: Pen, coat: Coat, form: Form, pose: float) -> Anchor:
    peak, eave = -0.82 - 0.1 * form[0], -0.16
    pen.part(box(0.36, -0.78, 0.56, -0.2), (150, 84, 70))
    pen.body([box(-0.68, eave, 0.68, 0.84)], coat)
    pen.body([[(-0.92, eave + 0.04), (0, peak), (0.92, eave + 0.04)]], Coat(darker(coat.base, 0.42)))
    door = -0.3 if form[1] < 0.5 else 0.3
    pen.part(box(door - 0.17, 0.3, door + 0.17, 0.84), WOOD)
    pen.part(box(-door - 0.19, 0.16, -door + 0.19, 0.52), (255, 236, 150))
    pen.stroke([(-door, 0.16), (-door, 0.52)], 0.05, INK)
    pen.part(disc(0, -0.38, 0.12), GLASS)
    return Anchor(0, peak + 0.04, 0.26)


def tree(pen: Pen, coat: Coat, form: Form, pose: float) -> Anchor:
    sway, spread = 0.05 * math.sin(2 * math.pi * pose), 0.36 + 0.08 * form[1]
    pen.part([(-0.12, 0.0), (0.12, 0.0), (0.2, 0.95), (-0.2, 0.95)], WOOD)
    pen.stroke([(0.0, 0.5), (0.3, 0.2)], 0.09, WOOD)
    lobes = [(0.0, -0.46 - 0.06 * form[0], 0.42), (-spread, -0.06, 0.38), (spread, -0.06, 0.38), (0, 0.02, 0.36)]
    pen.body([disc(x + sway, y, r) for x, y, r in lobes], coat)
    for x, y in ((-0.36, -0.16), (0.3, -0.3), (0.0, 0.12)):
        pen.stroke(arc(x + sway, y, 0.16, 0.13, 20, 160, 10), 0.05, darker(coat.base, 0.4))
    return Anchor(sway, -0.86 - 0.06 * form[0], 0.28)


def car(pen: Pen, coat: Coat, form: Form, pose: float) -> Anchor:
    roof, bonnet = -0.5 - 0.1 * form[0], 0.0 + 0.08 * form[1]
    cabin = [(-0.62, bonnet), (-0.42, roof), (0.28, roof), (0.56, bonnet)]
    shell = [(-0.95, 0.08), (-0.88, bonnet - 0.02), (0.6, bonnet - 0.02), (0.95, 0.14), (0.98, 0.46), (-0.97, 0.46)]
    pen.body([cabin, shell], coat)
    pen.part([(-0.47, bonnet), (-0.34, roof + 0.12), (-0.1, roof + 0.12), (-0.1, bonnet)], GLASS)
    pen.part([(0.02, bonnet), (0.02, roof + 0.12), (0.22, roof + 0.12), (0.4, bonnet)], GLASS)
    for x in (-0.52, 0.54):
        pen.part(disc(x, 0.48, 0.26), INK)
        pen.polygon(disc(x, 0.48, 0.12), STEEL)
    pen.polygon(disc(0.88, 0.22, 0.09), (255, 240, 150))
    return Anchor(-0.06, roof + 0.02, 0.27)


def robot(pen: Pen, coat: Coat, form: Form, pose: float) -> Anchor:
    wave, head = 0.45 * math.sin(2 * math.pi * pose), 0.34 + 0.08 * form[0]
    for side in (-1, 1):
        pen.limb([(0.22 * side, 0.55), (0.24 * side, 0.95)], 0.17, STEEL)
        hand = 0.12 - side * wave
        pen.limb([(0.42 * side, 0.1), (0.74 * side, hand)], 0.14, STEEL)
        pen.part(disc(0.78 * side, hand, 0.11), STEEL)
    pen.part(box(-0.12, -0.26, 0.12, 0.02), STEEL)
    pen.body([box(-0.46, -0.1, 0.46, 0.66), box(-head, -0.78, head, -0.22)], coat)
    for x in (-0.16, 0.16):
        pen.part(disc(x, -0.54, 0.1), (255, 244, 170))
    pen.stroke([(-0.16, -0.33), (0.16, -0.33)], 0.07, INK)
    pen.part(box(-0.2, 0.14, 0.2, 0.4), GLASS if form[1] < 0.5 else (255, 214, 90))
    return Anchor(0, -0.77, 0.28)


def flower(pen: Pen, coat: Coat, form: Form, pose: float) -> Anchor:
    petals, lean = 5 + round(2 * form[0]), 0.14 * math.sin(2 * math.pi * pose)
    pen.limb([(0, -0.2), (lean * 0.5, 0.4), (lean, 0.98)], 0.09, LEAF)
    pen.part([(lean * 0.5, 0.62), (0.3, 0.3), (0.56, 0.34), (0.4, 0.58)], LEAF)
    pen.part([(lean * 0.7, 0.78), (-0.3, 0.48), (-0.54, 0.54), (-0.36, 0.76)], LEAF)
    blades = []
    for i in range(petals):
        turn = 2 * math.pi * (i + 0.25) / petals
        blades.append(disc(0.36 * math.cos(turn), -0.32 + 0.36 * math.sin(turn), 0.25 + 0.03 * form[1]))
    pen.body(blades, coat)
    pen.part(disc(0, -0.32, 0.2), (250, 206, 60) if form[2] < 0.5 else (96, 60, 36))
    return Anchor(0, -0.86, 0.27)


def umbrella(pen: Pen, coat: Coat, form: Form, pose: float) -> Anchor:
    top, edge = -0.66 - 0.12 * form[0], 0.02
    pen.limb([(0, edge), (0, 0.74), *arc(0.15, 0.74, 0.15, 0.18, 180, 0, 8)], 0.07, WOOD)
    hem: list[Point] = []
    for i in range(4):
        hem += arc(0.92 * (1 - (2 * i + 1) / 4), edge, 0.23, 0.16, 360, 180, 8)
    pen.body([[*arc(0, edge, 0.92, edge - top, 180, 360), *hem]], coat)
    for x in (-0.46, 0.0, 0.46):
        pen.stroke([(x * 0.1, top), (x * 0.75, top * 0.55), (x, edge - 0.05)], 0.045, darker(coat.base, 0.5))
    pen.limb([(0, top), (0, top - 0.12)], 0.06, WOOD)
    return Anchor(0, top, 0.28)


def kite(pen: Pen, coat: Coat, form: Form, pose: float) -> Anchor:
    wide, waist = 0.64 + 0.12 * form[0], -0.24 + 0.1 * form[1]
    tail = [(0.12 * math.sin(1.3 * t + 6.28 * pose), 0.4 + 0.085 * t) for t in range(8)]
    pen.stroke(tail, 0.05, INK)
    for i in (3, 5, 7):
        x, y = tail[i]
        pen.part([(x, y), (x - 0.17, y - 0.1), (x - 0.17, y + 0.1)], coat.base)
        pen.part([(x, y), (x + 0.17, y - 0.1), (x + 0.17, y + 0.1)], coat.base)
    pen.body([[(0, -0.88), (wide, waist), (0, 0.46), (-wide, waist)]], coat)
    pen.stroke([(0, -0.88), (0, 0.46)], 0.05, darker(coat.base, 0.55))
    pen.stroke([(-wide, waist), (wide, waist)], 0.05, darker(coat.base, 0.55))
    return Anchor(0, -0.82, 0.26)


def lamp(pen: Pen, coat: Coat, form: Form, pose: float) -> Anchor:
    top, brim = 0.3 + 0.12 * form[0], 0.66 + 0.1 * form[1]
    pen.polygon(disc(0, 0.2, 0.9, 0.6), (255, 240, 160, 70))
    pen.limb([(0, 0.1), (0, 0.82)], 0.1, (206, 166, 84))
    pen.part([*arc(0, 0.92, 0.42, 0.16, 180, 360), (0.42, 0.96), (-0.42, 0.96)], (206, 166, 84))
    pen.part(disc(0, 0.14, 0.13), (255, 246, 180))
    pen.body([[(-top, -0.76), (top, -0.76), (brim, 0.1), (-brim, 0.1)]], coat)
    pen.stroke([(0.34, 0.12), (0.34, 0.4 + 0.06 * pose)], 0.04, INK)
    return Anchor(0, -0.75, 0.28)


SHAPES: dict[str, Shape] = {
    shape.__name__: shape
    for shape in (jellyfish, ball, fish, mug, house, tree, car, robot, flower, umbrella, kite, lamp)
}
