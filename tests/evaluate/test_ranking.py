"""What evaluate said of runs of the demo, made once by bench/evaluation.py, against what the critic knows of pictures
that no run has seen; what it says is computed here, from the scores kept."""

import csv
from pathlib import Path

import pytest
import torch

from lowvram_db.evaluate.recommend import FORGOTTEN, NOT_LEARNED, RUINED, findings, gains

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "evaluation.csv"
# Of the base model with the same prompts and noise, and the photos' likeness among themselves.
BASE = {"subject": 0.115, "prompt": 0.9375, "class_likeness": 0.253, "class_diversity": 1.0, "memorised": 0.0}
CEILING = 0.774
SCORES = tuple(BASE)


def rows(run):
    with RESULTS.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["run"] == run]


def found(row):
    own, base = ({name: torch.tensor([float(of[name])]) for name in SCORES} for of in (row, BASE))
    return findings(own, gains(own, base, CEILING))


def seeds():
    with RESULTS.open(newline="") as file:
        return sorted({row["run"] for row in csv.DictReader(file) if row["run"].startswith("seed")})


@pytest.mark.parametrize("run", seeds())
def test_the_recommended_step_is_within_a_twentieth_of_the_best_that_is_known(run):
    kept = [row for row in rows(run) if not found(row)]
    chosen = next(row for row in rows(run) if row["recommended"] == "1")
    assert chosen in kept and len(rows(run)) == 6
    assert float(chosen["truth"]) >= 0.95 * max(float(row["truth"]) for row in kept)


@pytest.mark.parametrize(
    ("run", "finding"), [("without prior", FORGOTTEN), ("30 steps", NOT_LEARNED), ("lr x 10", RUINED)]
)
def test_what_went_wrong_is_said_of_every_step(run, finding):
    assert rows(run)
    for row in rows(run):
        assert found(row) == [finding] == [row["findings"]]
