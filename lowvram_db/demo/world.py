"""The miniature world: captioned 64x64 scenes of one thing in one setting, drawn by our own code.

A scene is a plain value; the same scene is always the same picture. Scenes come from `training_scene(seed)` (which
never shows the held-out combinations, names and features) or are composed by hand for measuring.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from random import Random

from PIL import Image

from lowvram_db.demo.backdrops import BACKDROPS, FLOATING, SETTINGS, drop_shadow
from lowvram_db.demo.looks import COLOURS, Look, adorn, coat_of
from lowvram_db.demo.names import Individual, individuals, random_look
from lowvram_db.demo.pen import CANVAS, SIZE, SUPERSAMPLE, Pen
from lowvram_db.demo.shapes import SHAPES
from lowvram_db.demo.subjects import Subject

NOUNS = tuple(SHAPES)
NAMED_SHARE = 0.4
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Pose:
    """How a thing appears in one picture. `x`, `y`, `radius` as shares of the picture's side; `tilt` in degrees."""

    x: float = 0.5
    y: float = 0.54
    radius: float = 0.36
    tilt: float = 0.0
    mirrored: bool = False
    phase: float = 0.5


@dataclass(frozen=True)
class Scene:
    """One picture: a thing of class `noun` with `look`, in `setting`. `subject` replaces the look's drawing."""

    noun: str
    setting: str
    look: Look
    pose: Pose
    seed: int
    name: str | None = None
    subject: Subject | None = None


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture, SIZE x SIZE, drawn SUPERSAMPLE times larger and averaged."""
    canvas = BACKDROPS[scene.setting](Random(scene.seed))
    place(scene, canvas)
    return canvas.reduce(SUPERSAMPLE)


def place(scene: Scene, canvas: Image.Image) -> None:
    """Draws the scene's thing, and its shadow, on a canvas (RGB, CANVAS x CANVAS) that may hold other things."""
    pose = scene.pose
    x, y, radius = pose.x * CANVAS, pose.y * CANVAS, pose.radius * CANVAS
    if scene.setting not in FLOATING:
        drop_shadow(canvas, x, y + radius * 0.98, radius * 0.8)
    pen = Pen(canvas, x, y, radius, pose.tilt, pose.mirrored)
    if scene.subject is not None:
        scene.subject.draw(pen, pose.phase)
    else:
        anchor = SHAPES[scene.noun](pen, coat_of(scene.look), scene.look.form, pose.phase)
        adorn(pen, scene.look, anchor)


def is_held_out(noun: str, colour: str, setting: str) -> bool:
    """True for the tenth of all (class, colour, setting) combinations that the training stream never shows."""
    digest = hashlib.sha256(f"{noun}|{colour}|{setting}".encode()).digest()
    return int.from_bytes(digest[:4], "little") < HELD_OUT_SHARE * 2**32


def random_pose(rng: Random) -> Pose:
    radius = rng.uniform(0.29, 0.41)
    room = 0.5 - 0.93 * radius
    return Pose(
        x=0.5 + rng.uniform(-room, room),
        y=min(rng.uniform(0.5, 0.62), 0.98 - radius),
        radius=radius,
        tilt=rng.uniform(-14, 14),
        mirrored=rng.random() < 0.5,
        phase=rng.random(),
    )


def compose(noun: str, setting: str, seed: int, look: Look | None = None, colour: str | None = None) -> Scene:
    """A scene of a class in a setting; what is not given is drawn from `seed`. Knows nothing of held-out things."""
    rng = Random(seed)
    worn = look or random_look(rng)
    return Scene(noun, setting, replace(worn, colour=colour) if colour else worn, random_pose(rng), rng.getrandbits(32))


def individual_scene(one: Individual, setting: str, seed: int) -> Scene:
    return replace(compose(one.noun, setting, seed, one.look), name=one.name)


def subject_scene(subject: Subject, setting: str, seed: int) -> Scene:
    """The subject in any setting, in a pose drawn from `seed`."""
    return replace(compose(subject.noun, setting, seed), subject=subject)


def training_scene(seed: int) -> Scene:
    """Scene number `seed` of the training stream: any class, setting and look but the held-out ones."""
    rng = Random(f"training scene {seed}")
    while True:
        if rng.random() < NAMED_SHARE:
            scene = individual_scene(rng.choice(individuals()), rng.choice(SETTINGS), rng.getrandbits(32))
        else:
            scene = compose(rng.choice(NOUNS), rng.choice(SETTINGS), rng.getrandbits(32))
        if not is_held_out(scene.noun, scene.look.colour, scene.setting):
            return scene


__all__ = [
    "COLOURS",
    "NOUNS",
    "SETTINGS",
    "SIZE",
    "Pose",
    "Scene",
    "compose",
    "individual_scene",
    "is_held_out",
    "place",
    "random_pose",
    "render",
    "subject_scene",
    "training_scene",
]
