"""Hundreds of named individuals: an invented word before a class noun, and the look that goes with it.

A word is two or three pieces from small sets, so every piece is part of many names and a new word is made of pieces
the text encoder has met. Some words and some individuals are held out: no caption of the training stream holds them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from random import Random

from lowvram_db.demo.looks import ADORNMENTS, COLOURS, HELD_OUT_ADORNMENT, HELD_OUT_PATTERN, PATTERNS, Look
from lowvram_db.demo.shapes import SHAPES

FIRST = (
    "pk",
    "zo",
    "mi",
    "vr",
    "qua",
    "dru",
    "fli",
    "gn",
    "ka",
    "lu",
    "no",
    "plo",
    "sky",
    "tro",
    "wu",
    "yi",
    "xe",
    "hu",
)
MIDDLE = ("bl", "ra", "ni", "ti", "go", "lux", "be", "dr", "mo", "sha")
LAST = ("z", "rp", "vek", "nix", "mo", "dle", "wub", "x", "bit", "lt", "gor", "sp", "zu", "fen")

PER_CLASS = 26  # trained individuals a class: 312 in all
HELD_OUT_PER_CLASS = 3

# Words that no individual may ever bear: they are for subjects of DreamBooth runs.
NEW_WORDS = ("pkblz", "zorarp", "vrgovek", "mitinix", "quadrsp", "kabefen", "lushabit", "notizu")


@dataclass(frozen=True)
class Individual:
    name: str
    noun: str
    look: Look


def random_look(rng: Random, rich: bool = False) -> Look:
    """A look of the training world. `rich`: always with a pattern or an adornment, as named individuals have."""
    colour = rng.choice(list(COLOURS))
    pattern = rng.choice(PATTERNS[1:]) if rng.random() < (0.8 if rich else 0.45) else "plain"
    adornment = rng.choice(ADORNMENTS[1:]) if rng.random() < (0.8 if rich else 0.4) else "none"
    if rich and pattern == "plain" and adornment == "none":
        pattern = rng.choice(PATTERNS[1:])
    second = rng.choice([c for c in COLOURS if c != colour])
    top = rng.choice([c for c in COLOURS if c != colour])
    return Look(colour, pattern, second, adornment, top, (rng.random(), rng.random(), rng.random()))


def _word(rng: Random) -> str:
    middle = rng.choice(MIDDLE) if rng.random() < 0.6 else ""
    return rng.choice(FIRST) + middle + rng.choice(LAST)


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


@cache
def _everyone() -> tuple[tuple[Individual, ...], tuple[Individual, ...]]:
    rng, taken = Random(_seed("individuals")), set(NEW_WORDS)
    trained: list[Individual] = []
    held_out: list[Individual] = []
    for noun in SHAPES:
        features: set[tuple[str, ...]] = set()
        while len(features) < PER_CLASS + HELD_OUT_PER_CLASS:
            word, look = _word(rng), random_look(rng, rich=True)
            shown = (look.colour, look.pattern, look.pattern_colour, look.adornment, look.adornment_colour)
            if word in taken or shown in features:
                continue
            taken.add(word)
            features.add(shown)
            (trained if len(features) <= PER_CLASS else held_out).append(Individual(word, noun, look))
    unseen = Random(_seed("held-out features"))
    for i, one in enumerate(held_out):  # every third held-out individual has a feature the stream never shows
        if i % HELD_OUT_PER_CLASS == 0:
            changed = {**one.look.__dict__, "pattern": HELD_OUT_PATTERN, "adornment": HELD_OUT_ADORNMENT}
            changed["form"] = (unseen.random(), unseen.random(), unseen.random())
            held_out[i] = Individual(one.name, one.noun, Look(**changed))
    return tuple(trained), tuple(held_out)


def individuals(noun: str | None = None) -> tuple[Individual, ...]:
    """The individuals of the training stream, of one class or of all."""
    return tuple(one for one in _everyone()[0] if noun in (None, one.noun))


def held_out_individuals(noun: str | None = None) -> tuple[Individual, ...]:
    """Individuals whose names and pictures the training stream never shows."""
    return tuple(one for one in _everyone()[1] if noun in (None, one.noun))
