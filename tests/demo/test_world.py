"""The world draws what its captions say, the same way every time, and keeps its held-out things to itself."""

from random import Random

import numpy as np
import pytest

from lowvram_db.demo.captions import caption
from lowvram_db.demo.looks import COLOURS, HELD_OUT_ADORNMENT, HELD_OUT_PATTERN, Look
from lowvram_db.demo.names import NEW_WORDS, held_out_individuals, individuals
from lowvram_db.demo.subjects import SUBJECTS
from lowvram_db.demo.world import (
    NOUNS,
    SETTINGS,
    Pose,
    Scene,
    compose,
    individual_scene,
    is_held_out,
    render,
    subject_scene,
    training_scene,
)

STREAM = [training_scene(seed) for seed in range(3000)]


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene)).astype(float)


def still(noun: str = "ball", colour: str = "red", setting: str = "on grass") -> Scene:
    return Scene(noun, setting, Look(colour), Pose(), seed=7)


def thing(scene: Scene) -> np.ndarray:
    """The part of the picture around the thing's centre."""
    return pixels(scene)[18:50, 16:48]


def test_a_scene_is_always_the_same_picture() -> None:
    scene = training_scene(5)
    assert training_scene(5) == scene
    assert np.array_equal(pixels(scene), pixels(scene))
    assert pixels(scene).shape == (64, 64, 3)
    assert training_scene(6) != scene


def test_the_world_is_as_large_as_promised() -> None:
    assert len(NOUNS) >= 12
    assert len(COLOURS) == 10
    assert len(SETTINGS) == 10
    assert len(individuals()) >= 300


@pytest.mark.parametrize("kind", ["noun", "colour", "setting"])
def test_no_two_kinds_look_alike(kind: str) -> None:
    values = {"noun": NOUNS, "colour": tuple(COLOURS), "setting": SETTINGS}[kind]
    drawn = [pixels(still(**{kind: value})) for value in values]
    for i, first in enumerate(drawn):
        for j in range(i):
            assert np.abs(first - drawn[j]).mean() > 3.5, (values[i], values[j])


def test_every_thing_shows_its_colour() -> None:
    """The ground colour is on the thing itself: red paint for blue moves its pixels from blue to red."""
    for noun in NOUNS:
        change = thing(still(noun, "red")) - thing(still(noun, "blue"))
        moved = np.abs(change).max(axis=2) > 40
        assert moved.mean() > 0.12, noun
        assert change[moved][:, 0].mean() > 40 and change[moved][:, 2].mean() < -40, noun


def test_poses_stay_in_the_picture() -> None:
    for scene in STREAM[:500]:
        pose = scene.pose
        assert 0.9 * pose.radius < pose.x < 1 - 0.9 * pose.radius
        assert pose.y + 0.95 * pose.radius < 1.0


def test_held_out_combinations_never_appear() -> None:
    every = [(n, c, s) for n in NOUNS for c in COLOURS for s in SETTINGS]
    kept = [one for one in every if is_held_out(*one)]
    assert 0.07 < len(kept) / len(every) < 0.13
    assert not any(is_held_out(s.noun, s.look.colour, s.setting) for s in STREAM)


def test_held_out_names_and_features_never_appear() -> None:
    hidden = {one.name for one in held_out_individuals()} | set(NEW_WORDS)
    assert not hidden & {one.name for one in individuals()}
    assert not hidden & {scene.name for scene in STREAM}
    assert not any(s.look.pattern == HELD_OUT_PATTERN or s.look.adornment == HELD_OUT_ADORNMENT for s in STREAM)
    assert any(one.look.pattern == HELD_OUT_PATTERN for one in held_out_individuals())


def test_names_are_words_of_their_own() -> None:
    names = [one.name for one in (*individuals(), *held_out_individuals())]
    assert len(set(names)) == len(names)
    ordinary = set(" ".join(caption(s, Random(0)) for s in STREAM if s.name is None).split())
    assert not ordinary & set(names)


def test_an_individual_has_the_same_features_everywhere() -> None:
    looks: dict[str, set[Look]] = {}
    for scene in STREAM:
        if scene.name:
            looks.setdefault(scene.name, set()).add(scene.look)
    assert len(looks) > 250
    assert all(len(seen) == 1 for seen in looks.values())
    one = individuals("mug")[0]
    scenes = [individual_scene(one, setting, 3) for setting in SETTINGS[:3]]
    assert len({s.setting for s in scenes}) == 3 and len({s.look for s in scenes}) == 1


def test_captions_say_what_is_drawn() -> None:
    for seed, scene in enumerate(STREAM):
        said = caption(scene, Random(seed))
        assert scene.noun in said.split()
        assert not any(place in said for place in SETTINGS if place != scene.setting), said
        if scene.name:
            assert scene.name in said.split()
            assert not set(COLOURS) & set(said.split()), said
        else:
            worn = {scene.look.colour, scene.look.pattern_colour, scene.look.adornment_colour}
            assert set(COLOURS) & set(said.split()) <= worn, said
        if "on the left" in said or "on the right" in said:
            assert ("left" in said) == (scene.pose.x < 0.5)


def test_captions_leave_words_out() -> None:
    said = [caption(scene, Random(seed)) for seed, scene in enumerate(STREAM)]
    assert 0.1 < np.mean([not any(place in one for place in SETTINGS) for one in said]) < 0.35
    bare = {f"a photo of a {noun}" for noun in NOUNS} | {"a photo of an umbrella"}
    assert any(one in bare for one in said)


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=lambda one: one.name)
def test_subjects_stand_in_every_setting_and_look_like_nobody(subject) -> None:  # type: ignore[no-untyped-def]
    shown = [pixels(subject_scene(subject, setting, 1)) for setting in SETTINGS]
    for i, first in enumerate(shown):
        assert all(np.abs(first - shown[j]).mean() > 8 for j in range(i))
    pose = subject_scene(subject, "in snow", 1)
    for one in individuals(subject.noun):
        other = Scene(subject.noun, pose.setting, one.look, pose.pose, pose.seed)
        assert np.abs(pixels(pose) - pixels(other)).mean() > 5


def test_compose_takes_what_it_is_given() -> None:
    scene = compose("car", "in snow", 4, colour="pink")
    assert (scene.noun, scene.setting, scene.look.colour) == ("car", "in snow", "pink")
