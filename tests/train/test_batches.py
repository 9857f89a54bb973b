from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.cache.precompute import Cached
from lowvram_db.concept import Concept
from lowvram_db.families.base import Moments
from lowvram_db.train.batches import Batches


def make(photos, classes, size, prompts=("p",), seed=0):
    instance = [Path(f"i{number}") for number in range(photos)]
    prior = [Path(f"c{number}") for number in range(classes)]
    moments = {path: Moments(torch.full((1, 1, 1), float(number)), torch.zeros(1, 1, 1))
               for number, path in enumerate(instance + prior)}  # fmt: skip
    return Batches(
        Concept(instance, list(prompts), prior, "class"),
        Cached(moments, {}, {path: path.name for path in moments}, {"class": "c"}),
        size,
        seed,
    )


@given(photos=st.integers(1, 6), classes=st.integers(0, 9), size=st.integers(1, 4), seed=st.integers(0, 99))
def test_an_epoch_shows_every_photo_once(photos, classes, size, seed):
    batches = make(photos, classes, size, seed=seed)
    rows = 2 * size if classes else size
    seen = [batches[step].moments.mean.flatten().tolist() for step in range(photos * (classes or 1))]
    assert all(len(values) == rows for values in seen)
    instances = Counter(value for values in seen for value in values[:size])
    priors = Counter(value for values in seen for value in values[size:])
    assert set(instances.values()) == {size * (classes or 1)}
    assert sorted(instances) == list(range(photos))
    if classes:
        assert set(priors.values()) == {size * photos}
        assert sorted(priors) == list(range(photos, photos + classes))


def test_rows_are_subject_first_then_class():
    batch = make(3, 5, 2)[7]
    assert batch.prompts == ["p", "p", "class", "class"]
    assert batch.instances == 2
    assert batch.moments.mean.shape == (4, 1, 1, 1)


def test_identity_is_the_content_of_photos_and_prompts():
    assert make(1, 2, 1).identity == ["i0", "c0", "c1", "c"]


def test_a_step_is_the_same_whenever_it_is_asked_for():
    batches = make(5, 7, 2, prompts=("a", "b", "c"))
    late = batches[40]
    for step in range(40):
        batches[step]
    assert torch.equal(batches[40].moments.mean, late.moments.mean)
    assert batches[40].prompts == late.prompts


def test_order_changes_with_the_epoch_and_the_seed():
    def order(batches, epoch):
        return [batches[step].moments.mean[0].item() for step in range(epoch * 6, epoch * 6 + 6)]

    assert len({tuple(order(make(6, 0, 1), epoch)) for epoch in range(10)}) > 5
    assert order(make(6, 0, 1, seed=1), 0) != order(make(6, 0, 1, seed=2), 0)


@pytest.mark.parametrize("count", [2, 3])
def test_every_prompt_is_drawn_about_equally(count):
    batches = make(4, 0, 1, prompts=[f"p{number}" for number in range(count)])
    drawn = Counter(batches[step].prompts[0] for step in range(600))
    assert len(drawn) == count
    assert min(drawn.values()) > 600 / count * 0.8
