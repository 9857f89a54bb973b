"""The ten settings, really drawn. Each function paints a whole canvas from its own random numbers and says at what
height (canvas pixels) things stand, or None where they float."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from PIL import Image, ImageDraw

from lowvram_db.demo.pen import CANVAS, RGB, Paint, darker, disc, lighter, mix

Brush = ImageDraw.ImageDraw
Backdrop = Callable[[Random], Image.Image]


def _sky(*stops: RGB) -> Image.Image:
    """A canvas that runs from the first colour (top) to the last (bottom)."""
    column = Image.new("RGB", (1, len(stops)))
    for y, stop in enumerate(stops):
        column.putpixel((0, y), stop)
    return column.resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)


def _disc(brush: Brush, x: float, y: float, r: float, fill: Paint, flat: float = 1.0) -> None:
    brush.ellipse((x - r, y - r * flat, x + r, y + r * flat), fill=fill)


def _hill(brush: Brush, rng: Random, y: float, swell: float, fill: RGB) -> None:
    """Land from height `y` down, with a slow wave along its top."""
    phase, waves = rng.uniform(0, 6.28), rng.uniform(0.7, 1.3)
    top = [(x, y + swell * math.sin(phase + waves * 6.28 * x / CANVAS)) for x in range(0, CANVAS + 17, 16)]
    brush.polygon([*top, (CANVAS + 16, CANVAS), (0, CANVAS)], fill=fill)


def sea(rng: Random) -> Image.Image:
    canvas = _sky((110, 222, 226), (40, 158, 206), (18, 96, 168), (12, 60, 128))
    brush = ImageDraw.Draw(canvas, "RGBA")
    for _ in range(3):
        x, w = rng.uniform(0, CANVAS), rng.uniform(12, 26)
        brush.polygon([(x, 0), (x + w, 0), (x + w * 2 - 70, CANVAS), (x - 90, CANVAS)], fill=(220, 255, 250, 38))
    floor = CANVAS * rng.uniform(0.84, 0.9)
    _hill(brush, rng, floor, 7, (216, 192, 130))
    for _ in range(4):
        x, tall, lean = rng.uniform(0, CANVAS), rng.uniform(40, 84), rng.uniform(-8, 8)
        weed = [(x + lean * math.sin(t), floor + 16 - tall * t / 5) for t in range(6)]
        brush.line(weed, fill=(26, 124, 84), width=9, joint="curve")
    for _ in range(5):
        x, y, r = rng.uniform(0, CANVAS), rng.uniform(20, 200), rng.uniform(5, 10)
        _disc(brush, x, y, r, (210, 245, 250, 170))
    return canvas


def grass(rng: Random) -> Image.Image:
    canvas = _sky((98, 178, 244), (150, 208, 250), (206, 234, 252))
    brush = ImageDraw.Draw(canvas, "RGBA")
    for _ in range(2):
        x, y = rng.uniform(10, CANVAS - 10), rng.uniform(20, 70)
        for dx, r in ((-22, 14), (0, 20), (22, 15)):
            _disc(brush, x + dx, y, r, (255, 255, 255), 0.75)
    ground = CANVAS * rng.uniform(0.56, 0.64)
    _hill(brush, rng, ground - 8, 12, (126, 196, 84))
    _hill(brush, rng, ground + 22, 8, (92, 176, 62))
    for _ in range(9):
        x, y = rng.uniform(0, CANVAS), rng.uniform(ground + 40, CANVAS)
        brush.polygon([(x - 8, y), (x - 6, y - 16), (x, y - 3), (x + 7, y - 18), (x + 9, y)], fill=(58, 138, 44))
    for _ in range(4):
        _disc(brush, rng.uniform(0, CANVAS), rng.uniform(ground + 50, CANVAS - 6), 5, (255, 250, 230))
    return canvas


def night(rng: Random) -> Image.Image:
    canvas = _sky((10, 14, 52), (22, 30, 92), (44, 56, 130))
    brush = ImageDraw.Draw(canvas, "RGBA")
    for _ in range(11):
        _disc(brush, rng.uniform(0, CANVAS), rng.uniform(0, 150), rng.uniform(2.5, 4.5), (255, 250, 214))
    x, y, r = rng.choice((rng.uniform(30, 70), rng.uniform(186, 226))), rng.uniform(30, 56), rng.uniform(21, 27)
    _disc(brush, x, y, r + 9, (250, 240, 190, 40))
    _disc(brush, x, y, r, (252, 240, 180))
    _disc(brush, x + r * 0.45, y - r * 0.25, r * 0.8, (20, 26, 78))
    ground = CANVAS * rng.uniform(0.72, 0.78)
    _hill(brush, rng, ground, 14, (20, 34, 74))
    _hill(brush, rng, ground + 28, 9, (12, 22, 50))
    return canvas


def table(rng: Random) -> Image.Image:
    canvas = _sky((236, 222, 196), (228, 208, 176))
    brush = ImageDraw.Draw(canvas, "RGBA")
    x = rng.choice((rng.uniform(14, 50), rng.uniform(150, 190)))
    brush.rectangle((x, 22, x + 58, 86), fill=(156, 110, 66))
    brush.rectangle((x + 7, 29, x + 51, 79), fill=(174, 212, 222))
    brush.polygon([(x + 7, 79), (x + 24, 48), (x + 36, 64), (x + 44, 56), (x + 51, 79)], fill=(110, 160, 130))
    top = CANVAS * rng.uniform(0.58, 0.64)
    brush.rectangle((0, top, CANVAS, CANVAS), fill=(186, 124, 68))
    brush.rectangle((0, top, CANVAS, top + 6), fill=(222, 168, 108))
    vanish = CANVAS * rng.uniform(0.4, 0.6)
    for i in range(-3, 4):  # planks run towards the wall
        brush.line((vanish + 34 * i, top + 6, vanish + 86 * i, CANVAS), fill=(146, 92, 48), width=5)
    brush.rectangle((0, CANVAS - 15, CANVAS, CANVAS), fill=(122, 76, 40))
    return canvas


def snow(rng: Random) -> Image.Image:
    canvas = _sky((152, 176, 206), (182, 202, 224), (208, 222, 236))
    brush = ImageDraw.Draw(canvas, "RGBA")
    ground = CANVAS * rng.uniform(0.58, 0.66)
    _hill(brush, rng, ground - 6, 12, (216, 228, 242))
    for x in (rng.uniform(8, 80), rng.uniform(176, 248)):
        y, r = ground + rng.uniform(0, 14), rng.uniform(22, 30)
        brush.rectangle((x - 4, y - 8, x + 4, y + 8), fill=(92, 66, 52))
        for i in range(3):
            level, half = y - 6 - i * r * 0.62, r * (1 - 0.26 * i)
            brush.polygon([(x - half, level), (x, level - r * 1.05), (x + half, level)], fill=(46, 104, 88))
            brush.polygon(
                [(x - half * 0.4, level - r * 0.62), (x, level - r * 1.05), (x + half * 0.4, level - r * 0.62)],
                fill=(250, 252, 255),
            )
    _hill(brush, rng, ground + 16, 8, (240, 246, 252))
    for _ in range(16):
        _disc(brush, rng.uniform(0, CANVAS), rng.uniform(0, CANVAS * 0.7), rng.uniform(3.5, 6), (255, 255, 255))
    return canvas


def desert(rng: Random) -> Image.Image:
    canvas = _sky((250, 206, 120), (252, 224, 158), (254, 238, 196))
    brush = ImageDraw.Draw(canvas, "RGBA")
    _disc(brush, rng.uniform(30, 226), rng.uniform(28, 56), 22, (255, 250, 220))
    ground = CANVAS * rng.uniform(0.58, 0.66)
    _hill(brush, rng, ground - 6, 16, (222, 166, 92))
    for x, tall in ((rng.uniform(14, 70), rng.uniform(56, 74)), (rng.uniform(186, 242), rng.uniform(44, 64))):
        foot, side = ground + 24, rng.choice((-1, 1))
        brush.line((x, foot, x, foot - tall), fill=(66, 128, 76), width=15)
        _disc(brush, x, foot - tall, 7, (66, 128, 76))
        arm = [(x, foot - tall * 0.4), (x + 19 * side, foot - tall * 0.4), (x + 19 * side, foot - tall * 0.75)]
        brush.line(arm, fill=(66, 128, 76), width=10, joint="curve")
    _hill(brush, rng, ground + 26, 12, (236, 188, 112))
    _hill(brush, rng, ground + 66, 8, (226, 172, 94))
    return canvas


def city(rng: Random) -> Image.Image:
    canvas = _sky((168, 192, 208), (206, 216, 220))
    brush = ImageDraw.Draw(canvas, "RGBA")
    street, x = CANVAS * rng.uniform(0.68, 0.74), rng.uniform(-30, 0)
    while x < CANVAS:
        wide, tall = rng.uniform(44, 66), rng.uniform(70, 150)
        wall = mix((88, 98, 122), (140, 132, 138), rng.random())
        brush.rectangle((x, street - tall, x + wide, street), fill=wall)
        for column in range(2):
            for row in range(int(tall // 30)):
                left, top = x + wide * (0.16 + 0.42 * column), street - tall + 10 + 30 * row
                glass = (250, 226, 136) if rng.random() < 0.4 else lighter(wall, 0.4)
                brush.rectangle((left, top, left + wide * 0.26, top + 15), fill=glass)
        x += wide + 3
    brush.rectangle((0, street, CANVAS, street + 12), fill=(178, 178, 180))
    brush.rectangle((0, street + 12, CANVAS, CANVAS), fill=(78, 80, 88))
    start = rng.uniform(-50, 0)
    for i in range(5):
        left = start + 70 * i
        brush.rectangle((left, street + 40, left + 38, street + 47), fill=(240, 236, 214))
    return canvas


def forest(rng: Random) -> Image.Image:
    canvas = _sky((38, 92, 60), (62, 122, 76), (96, 150, 92))
    brush = ImageDraw.Draw(canvas, "RGBA")
    ground = CANVAS * rng.uniform(0.68, 0.74)
    for shade, width, count in ((0.5, 17, 5), (0.0, 29, 3)):
        bark = mix((84, 58, 40), (62, 110, 74), shade)
        for i in range(count):
            x = (i + rng.uniform(0.2, 0.8)) * CANVAS / count
            brush.polygon(
                [
                    (x - width / 2, 0),
                    (x + width / 2, 0),
                    (x + width * 0.65, ground + 20),
                    (x - width * 0.65, ground + 20),
                ],
                fill=bark,
            )
    for _ in range(7):
        _disc(brush, rng.uniform(0, CANVAS), rng.uniform(-14, 16), rng.uniform(26, 38), (30, 84, 46), 0.8)
    _hill(brush, rng, ground, 8, (58, 88, 40))
    for _ in range(6):
        x, y = rng.uniform(0, CANVAS), rng.uniform(ground + 12, CANVAS)
        for lean in (-14, 0, 14):
            brush.polygon([(x - 5, y), (x + lean, y - 24), (x + 5, y)], fill=(96, 140, 56))
    return canvas


def sunset(rng: Random) -> Image.Image:
    canvas = _sky((92, 44, 120), (196, 72, 122), (250, 128, 84), (255, 196, 96), (255, 214, 120))
    brush = ImageDraw.Draw(canvas, "RGBA")
    shore, x = CANVAS * rng.uniform(0.66, 0.72), rng.uniform(50, 206)
    _disc(brush, x, shore, 50, (255, 236, 160, 90))
    _disc(brush, x, shore, 36, (255, 240, 170))
    brush.rectangle((0, shore, CANVAS, CANVAS), fill=(96, 50, 112))
    for i in range(5):
        half, level = 46 - 7 * i + rng.uniform(-5, 5), shore + 9 + 15 * i
        brush.line((x - half, level, x + half, level), fill=(255, 176, 110), width=6)
    for side in (0, CANVAS):
        wide, tall = rng.uniform(40, 90), rng.uniform(24, 44)
        brush.polygon([(side - wide, shore), (side, shore - tall), (side + wide, shore)], fill=(66, 34, 86))
    return canvas


def moon(rng: Random) -> Image.Image:
    canvas = _sky((6, 6, 12), (14, 14, 24))
    brush = ImageDraw.Draw(canvas, "RGBA")
    for _ in range(12):
        _disc(brush, rng.uniform(0, CANVAS), rng.uniform(0, 150), rng.uniform(2.5, 4), (255, 255, 255))
    x, y, r = rng.choice((rng.uniform(34, 64), rng.uniform(192, 222))), rng.uniform(36, 58), 27
    _disc(brush, x, y, r, (58, 124, 214))
    _disc(brush, x - 8, y - 7, 11, (92, 178, 98), 0.8)
    _disc(brush, x + 10, y + 8, 9, (92, 178, 98), 0.9)
    _disc(brush, x + 4, y - 17, 7, (240, 248, 255), 0.5)
    ground = CANVAS * rng.uniform(0.66, 0.72)
    soil: RGB = (164, 164, 172)
    _hill(brush, rng, ground, 6, soil)
    for _ in range(6):
        cx, cy, cr = rng.uniform(0, CANVAS), rng.uniform(ground + 20, CANVAS), rng.uniform(12, 24)
        _disc(brush, cx, cy, cr, lighter(soil, 0.45), 0.42)
        _disc(brush, cx, cy - 2, cr * 0.84, darker(soil, 0.35), 0.38)
    return canvas


BACKDROPS: dict[str, Backdrop] = {
    "in the sea": sea,
    "on grass": grass,
    "at night": night,
    "on a table": table,
    "in snow": snow,
    "in the desert": desert,
    "in the city": city,
    "in the forest": forest,
    "at sunset": sunset,
    "on the moon": moon,
}
SETTINGS = tuple(BACKDROPS)
FLOATING = ("in the sea",)


def drop_shadow(canvas: Image.Image, x: float, foot: float, half: float) -> None:
    """A soft shadow on the ground under a thing whose lowest point is at `foot`."""
    brush = ImageDraw.Draw(canvas, "RGBA")
    for spread in (1.0, 0.8, 0.6):
        points = [(x + px * half * spread, foot + py * half * 0.2 * spread) for px, py in disc(0, 0, 1)]
        brush.polygon(points, fill=(16, 12, 34, 44))
