"""The shipped critic judges rightly: it names what is drawn and knows an individual again."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lowvram_db.demo.critic import Critic, accuracy, labels_of, load_critic
from lowvram_db.demo.measure import likeness, likeness_among, prompts_to_check, subject_pixels
from lowvram_db.demo.names import held_out_individuals, individuals
from lowvram_db.demo.scenes import held_out_scene, to_pixels, unseen_combination
from lowvram_db.demo.subjects import SUBJECTS
from lowvram_db.demo.world import SETTINGS, Scene, individual_scene, is_held_out, render


@pytest.fixture(scope="module")
def critic() -> Critic:
    return load_critic()


def drawn(scenes: list[Scene]) -> Tensor:
    return to_pixels(np.stack([np.asarray(render(scene)) for scene in scenes]))


# Floors two standard deviations of 200 pictures under what bench/demo_base.py finds on more of them.
@pytest.mark.parametrize(("source", "floor"), [(held_out_scene, 0.965), (unseen_combination, 0.945)])
def test_it_names_class_colour_and_setting(critic: Critic, source, floor) -> None:  # type: ignore[no-untyped-def]
    scenes = [source(50_000 + i) for i in range(200)]
    assert min(accuracy(critic, drawn(scenes), labels_of(scenes)).values()) >= floor


def test_embeddings_have_length_one(critic: Critic) -> None:
    looks = critic.judge(drawn([held_out_scene(0), held_out_scene(1)]))[3]
    assert torch.allclose(looks.norm(dim=1), torch.ones(2), atol=1e-5)


def test_it_knows_individuals_again_that_it_never_met(critic: Critic) -> None:
    met = held_out_individuals()[:20]
    first = drawn([individual_scene(one, "in snow", 1) for one in met])
    second = drawn([individual_scene(one, "at night", 2) for one in met])
    found = (critic.judge(first)[3] @ critic.judge(second)[3].T).argmax(1)
    assert (found == torch.arange(len(met))).float().mean() >= 0.9


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=lambda one: one.name)
def test_subjects_are_told_from_everyone_of_their_class(critic: Critic, subject) -> None:  # type: ignore[no-untyped-def]
    held_out = subject_pixels(subject, SETTINGS, 2, seed=1)
    among = likeness_among(critic, held_out)
    others = drawn([individual_scene(one, SETTINGS[i % 10], i) for i, one in enumerate(individuals(subject.noun))])
    assert among > 0.7
    own = likeness(critic, subject_pixels(subject, SETTINGS, 4, seed=2), held_out)
    assert likeness(critic, others, held_out).max() < own.min()
    assert likeness(critic, others, held_out).mean() < 0.3 * among


def test_prompts_to_check_keep_seen_and_unseen_apart() -> None:
    assert all(is_held_out(one.noun, one.colour, one.setting) for one in prompts_to_check(30, unseen=True))
    assert not any(is_held_out(one.noun, one.colour, one.setting) for one in prompts_to_check(30, unseen=False))
