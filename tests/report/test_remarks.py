"""What is said of a run's state, by runs that differ from one in order in a single thing."""

from dataclasses import replace

import pytest

from lowvram_db.report.remarks import remarks
from lowvram_db.report.scores import Evaluation, Scores
from lowvram_db.report.story import Story

GIB = 2**30
METRICS = {name: [(20, 0.1), (40, 0.1)] for name in ("loss", "lr")}
IN_ORDER = Story("jelly", {"train.steps": 40}, metrics=METRICS, budget=2.0 * GIB, photo_count=3, finished=True)


def measured(**last):
    return {"metrics": METRICS | {name: [(20, 1.0), (40, value)] for name, value in last.items()}}


CASES = [
    ({}, None),
    ({"settings": {"train.steps": 1200}}, "It stands at step 40 of 1,200; the same command goes on from the last"),
    ({"finished": False}, "There is no finished model yet; the same command writes it."),
    ({"metrics": METRICS | {"loss": [(40, 0.1)]}}, "In 1 step the loss was no number; a lower learning rate or fp32"),
    ({"metrics": {"lr": METRICS["lr"]}}, "In 2 steps the loss was no number"),
    (measured(validation_class=1.12), "The loss on class images has risen to 1.12 times its beginning: the class is"),
    (measured(validation_class=1.09), None),
    (measured(validation_subject=0.8, validation_held_out=1.1), "The loss falls on the photos trained on and rises"),
    (measured(validation_subject=0.8, validation_held_out=0.9), None),
    (measured(validation_subject=0.95, validation_held_out=1.1), None),
    (measured(peak_bytes=3.0 * GIB), "A step has taken 3.00 GiB, more than the budget of 2.00 GiB."),
    (measured(peak_bytes=1.9 * GIB), None),
    (measured(peak_bytes=3.0 * GIB) | {"budget": None}, None),
    ({"photo_count": 2}, "There are only 2 photos of the subject; three to six show it from more sides."),
    ({"lacking": ["plan.json: cannot be read"]}, "Left out here: plan.json: cannot be read."),
]


@pytest.mark.parametrize(("changed", "said"), CASES)
def test_what_is_out_of_order_is_said_and_no_more(changed, said):
    found = list(remarks(replace(IN_ORDER, **changed), None))
    assert len(found) == (said is not None) and all(remark.startswith(said) for remark in found)


def test_findings_are_those_of_the_last_checkpoint():
    scores = [Scores(20, {}, ["not yet learned"]), Scores(40, {}, ["memorised", "odd"])]
    found = list(remarks(IN_ORDER, Evaluation(scores, None, "", "", "")))
    assert found[0].startswith("The photos are memorised: ")
    assert found[1:] == ["The last checkpoint was found to be: odd."]
