"""What a caption says of a scene: only true things, in several wordings, and rarely everything."""

from __future__ import annotations

from random import Random

from lowvram_db.demo.looks import Look
from lowvram_db.demo.world import Scene

WORDINGS = ("a photo of {}", "a photo of {}", "a picture of {}", "a drawing of {}", "{}")
PATTERN_NOUNS = {"striped": "stripes", "banded": "bands", "dotted": "dots", "two-tone": "bottom", "zigzag": "zigzags"}


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeio' or words.startswith('umb') else 'a'} {words}"


def prompt(noun: str, colour: str | None = None, setting: str | None = None, name: str | None = None) -> str:
    """The plainest wording: "a photo of a red mug in snow", "a photo of the zorp mug in snow"."""
    words = f"the {name} {noun}" if name else _with_article(f"{colour} {noun}" if colour else noun)
    return f"a photo of {words} {setting}" if setting else f"a photo of {words}"


def _wearing(look: Look, rng: Random, said: float) -> str:
    """ " with blue stripes and a yellow crown", or part of it, or nothing."""
    worn = []
    if look.pattern not in ("plain", "two-tone") and rng.random() < said:
        worn.append(f"{look.pattern_colour} {PATTERN_NOUNS[look.pattern]}")
    if look.pattern == "two-tone" and rng.random() < said:
        worn.append(f"a {look.pattern_colour} bottom")
    if look.adornment != "none" and rng.random() < said:
        worn.append(f"a {look.adornment_colour} {look.adornment}")
    return f" with {' and '.join(worn)}" if worn else ""


def _thing(scene: Scene, rng: Random) -> str:
    look, words = scene.look, []
    if rng.random() < 0.15 and not 0.325 < scene.pose.radius < 0.375:
        words.append("small" if scene.pose.radius < 0.35 else "large")
    if look.pattern == "plain" and look.adornment == "none" and rng.random() < 0.25:
        words.append("plain")
    elif look.pattern != "plain" and rng.random() < 0.2:
        words.append(look.pattern)
    if rng.random() < 0.75:
        words.append(look.colour)
    words.append(scene.noun)
    return _with_article(" ".join(words)) + _wearing(look, rng, 0.55)


def caption(scene: Scene, rng: Random) -> str:
    """A caption of the scene, its wording drawn from `rng`. A named individual is called by its name alone."""
    if scene.name is not None:
        thing = rng.choice(("the {} {}", "the {} {}", "a {} {}", "{} {}")).format(scene.name, scene.noun)
        where, sides = 0.85, 0.1
    elif rng.random() < 0.1:
        return rng.choice(WORDINGS).format(_with_article(scene.noun))
    else:
        thing, where, sides = _thing(scene, rng), 0.82, 0.15
    if rng.random() < sides and abs(scene.pose.x - 0.5) > 0.1:
        thing += " on the left" if scene.pose.x < 0.5 else " on the right"
    if rng.random() < where:
        thing += f" {scene.setting}"
    return rng.choice(WORDINGS).format(thing)
