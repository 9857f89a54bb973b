"""What evaluation.json says (lowvram_db/evaluate tells its form), and how it is shown."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from lowvram_db.report.curves import Curve, chart, wide
from lowvram_db.report.markup import Html, element, foreign
from lowvram_db.report.pictures import step_name
from lowvram_db.report.story import finite

_NAMES = {
    "subject": "subject likeness",
    "prompt": "prompt agreement",
    "class_likeness": "class taken for the subject",
    "class_diversity": "variety of the class",
    "memorised": "copies of a photo",
}


class Interval(NamedTuple):
    """Of a mean over seeds; of one seed there is none."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        known = self.low is not None and self.high is not None
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})" if known else f"{self.mean:.3f}"


@dataclass(frozen=True)
class Scores:
    """Of one checkpoint, or of the base model as step 0."""

    step: int
    values: dict[str, Interval]
    findings: list[str]


@dataclass(frozen=True)
class Evaluation:
    """As much of it as is in order."""

    scores: list[Scores]
    recommended: int | None
    reason: str
    backbone: str
    compared_with: str

    @property
    def best(self) -> Scores | None:
        return next((scores for scores in self.scores if scores.step == self.recommended), None)


def read_evaluation(tree: dict[str, Any]) -> Evaluation | None:
    """None where nothing was evaluated. Raises TypeError, KeyError, ValueError or AttributeError for another form."""
    if not tree:
        return None
    if tree["format"] != 1:
        raise ValueError(f"of format {tree['format']!r}, which this version does not know")
    base = Scores(0, _intervals(tree["base"] or {}), [])
    kept = [
        Scores(int(kept["step"]), _intervals(kept["scores"]), [str(said) for said in kept["findings"]])
        for kept in tree["checkpoints"]
    ]
    chosen = tree["recommended"] or {}
    step = int(chosen["step"]) if chosen else None
    said = [str(value) for value in (chosen.get("reason", ""), tree["backbone"], tree["compared_with"])]
    return Evaluation([base, *sorted(kept, key=lambda scores: scores.step)], step, *said)


def _intervals(scores: dict[str, Any]) -> dict[str, Interval]:
    known = {}
    for name in _NAMES:
        mean, low, high = (finite((scores.get(name) or {}).get(part)) for part in Interval._fields)
        if mean is not None:
            known[name] = Interval(mean, low, high)
    return known


def scores_by_step(evaluation: Evaluation) -> Html:
    """The recommended step with its reason, a table, and the curves."""
    told = [
        element("p", element("strong", f"Keep {step_name(evaluation.recommended)}."), " ", foreign(evaluation.reason))
        if evaluation.recommended is not None
        else element("p", "No step is recommended."),
        element(
            "p",
            "Judged by ", foreign(evaluation.backbone), ", compared with ", foreign(evaluation.compared_with),
            ". In brackets the 95% interval over seeds.",
            class_="soft",
        ),
    ]  # fmt: skip
    names = [name for name in _NAMES if any(name in scores.values for scores in evaluation.scores)]
    head = element(
        "tr", *(element("th", text, scope="col") for text in ["of", *(_NAMES[name] for name in names), "remarks"])
    )
    rows = [
        element(
            "tr",
            element("th", step_name(scores.step), scope="row"),
            *(element("td", str(scores.values.get(name, ""))) for name in names),
            element("td", _remark(scores, evaluation)),
            class_="marked" if scores is evaluation.best else None,
        )
        for scores in evaluation.scores
    ]
    curves = [
        Curve(_NAMES[name], [(of.step, of.values[name].mean) for of in evaluation.scores if name in of.values], colour)
        for colour, name in enumerate(names)
    ]
    table = wide("Scores by step", element("table", element("thead", head), element("tbody", rows)))
    return element("div", told, table, element("div", chart("Scores", curves), class_="charts"))


def _remark(scores: Scores, evaluation: Evaluation) -> str:
    return "; ".join((["recommended"] if scores is evaluation.best else []) + scores.findings)
