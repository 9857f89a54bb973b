import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from lowvram_db.evaluate.scores import MOST_SEEDS, Drawn, Photos, interval, scores


def unit(*shape, seed):
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(2, 5), st.integers(0, 99))
def test_scores_are_what_their_names_say(prompts, seeds, held_out, photos, seed):
    """Against loops over pictures in numpy."""
    trained, apart = unit(photos, 6, seed=seed), unit(held_out, 6, seed=seed + 1)
    looks = unit(photos, 5, seed=seed + 2)
    base, own = (
        Drawn(unit(prompts, seeds, 6, seed=s), unit(prompts, seeds, 5, seed=s + 1), None, unit(3, seeds, 6, seed=s + 2))
        for s in (seed + 10, seed + 20)
    )
    references, others = (apart, trained) if held_out else (trained, apart)
    known = Photos.of(references, others, looks)
    everything = [*references.numpy(), *others.numpy()]
    pairs = [cosine(a, b) for i, a in enumerate(references.numpy()) for j, b in enumerate(everything) if i != j]
    assert known.similarity == pytest.approx(np.mean(pairs), abs=1e-5)

    got, nearest = scores(own, base, known), max(cosine(a, b) for i, a in enumerate(looks) for b in looks[:i])
    for s in range(seeds):
        alike = [cosine(own.subject[p, s], r) for p in range(prompts) for r in references]
        assert got["subject"][s].item() == pytest.approx(np.mean(alike), abs=1e-5)
        copies = [max(cosine(own.appearance[p, s], t) for t in looks) > nearest for p in range(prompts)]
        assert got["memorised"][s].item() == pytest.approx(np.mean(copies))
        plain = [cosine(own.plain[c, s], r) for c in range(3) for r in references]
        assert got["class_likeness"][s].item() == pytest.approx(np.mean(plain), abs=1e-5)

        def apart_by(drawn, s):
            return np.mean([1 - cosine(drawn.plain[a, s], drawn.plain[b, s]) for a in range(3) for b in range(a)])

        before = np.mean([apart_by(base, t) for t in range(seeds)])
        assert got["class_diversity"][s].item() == pytest.approx(apart_by(own, s) / before, rel=1e-4)
    assert got["prompt"] is None


def test_of_one_photo_nothing_is_said_of_copies():
    one = unit(1, 4, seed=0)
    known = Photos.of(one, one[:0], one)
    drawn = Drawn(unit(2, 2, 4, seed=1), unit(2, 2, 4, seed=2), torch.ones(2, 2), unit(3, 2, 4, seed=3))
    assert known.similarity == 1
    assert scores(drawn, drawn, known)["memorised"] is None


def test_intervals_hold_the_truth_nineteen_times_of_twenty():
    draws = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    held = [one["low"] < 0 < one["high"] for one in map(interval, draws)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)
    assert interval(torch.tensor([0.5])) == {"mean": 0.5, "low": None, "high": None, "by_seed": [0.5]}
    assert interval(torch.tensor([0.0, 1.0]))["by_seed"] == [0, 1]
    assert interval(torch.linspace(0, 1, MOST_SEEDS))["high"] > 0.5
    assert interval(None) is None
