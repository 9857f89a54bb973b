"""What evaluate says of runs of the demo, made once by bench/evaluation.py, against what the critic knows of pictures
that no run has seen. Their scores by seed are kept in judged.json; the rule is applied to them here."""

import json
from pathlib import Path

import pytest
import torch

from lowvram_db.evaluate.recommend import FORGOTTEN, NOT_LEARNED, RUINED, findings, gains, recommend

JUDGED = json.loads((Path(__file__).parent / "judged.json").read_text())
SEEDS = [run for run in JUDGED if run.startswith("seed")]


def scores(by_seed):
    return {name: torch.tensor(values) for name, values in by_seed.items() if name != "truth"}


def judged(run):
    """What the rule finds of each step of a run, and which it recommends."""
    kept = JUDGED[run]
    base, own = scores(kept["base"]), {int(step): scores(of) for step, of in kept["checkpoints"].items()}
    gained = {step: gains(of, base, kept["photos_similarity"]) for step, of in own.items()}
    found = {step: findings(own[step], gained[step]) for step in own}
    return found, recommend(gained, found)


@pytest.mark.parametrize("run", SEEDS)
def test_the_recommended_step_is_within_a_twentieth_of_the_best_that_is_known(run):
    truths = {int(step): of["truth"] for step, of in JUDGED[run]["checkpoints"].items()}
    assert len(truths) == 6
    found, chosen = judged(run)
    assert truths[chosen.step] >= 0.95 * max(truths.values())
    assert found[chosen.step] == []


@pytest.mark.parametrize(
    ("run", "finding"), [("without prior", FORGOTTEN), ("30 steps", NOT_LEARNED), ("lr x 10", RUINED)]
)
def test_what_went_wrong_is_said_of_every_step(run, finding):
    found, chosen = judged(run)
    assert found and all(said == [finding] for said in found.values())
    assert f"; but {finding} (" in chosen.reason
