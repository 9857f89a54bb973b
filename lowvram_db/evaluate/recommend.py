"""The step to keep, and why. docs/evaluate.md states the rule in words.

Three gains of a checkpoint, each 0 at worst and 1 at best, tell what was won and what was lost:

    learned   how far it has come from the base model's likeness to the photos to that of the photos themselves
    follows   how much of the base model's agreement with prompts is left
    kept      how much of the class: the lesser of its diversity, and of its distance from the subject

A checkpoint is dominated where another is as good in all three and better in one. Of the others the one with the
largest product is the best; kept is the earliest of them that is not worse than that by more than a standard error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowvram_db.evaluate.scores import Scores, standard_error

NOT_LEARNED, MEMORISED, FORGOTTEN, RUINED = (
    "not yet learned",
    "memorised",
    "the class is forgotten",
    "the model is ruined",
)
_LEAST_LEARNED = 0.6
_LEAST_KEPT = 0.5
_LEAST_FOLLOWED = 0.5
_MOST_COPIES = 0.5
_MENDS = {
    NOT_LEARNED: "train for more steps",
    MEMORISED: "take an earlier step, a lower train.lr or more photos",
    FORGOTTEN: "train with prior.enabled = true, or a higher prior.weight",
    RUINED: "lower train.lr",
}


@dataclass(frozen=True)
class Gains:
    """Of one checkpoint, by seed: float32 [S] each."""

    learned: Tensor
    follows: Tensor
    kept: Tensor

    @property
    def product(self) -> Tensor:
        return self.learned * self.follows * self.kept

    def means(self) -> tuple[float, float, float]:
        return self.learned.mean().item(), self.follows.mean().item(), self.kept.mean().item()


def gains(scores: Scores, base: Scores, ceiling: float) -> Gains:
    """ceiling: the photos' similarity among themselves."""
    start, plain = _of(base, "subject").mean(), _of(base, "class_likeness").mean()
    learned = (_of(scores, "subject") - start) / max(ceiling - start.item(), 1e-6)
    taken_over = (_of(scores, "class_likeness") - plain) / max(ceiling - plain.item(), 1e-6)
    agreement, before = scores["prompt"], base["prompt"]
    follows = torch.ones_like(learned) if agreement is None or before is None else agreement / before.mean().clamp(1e-6)
    kept = torch.minimum(1 - taken_over, _of(scores, "class_diversity"))
    return Gains(*(part.clamp(0, 1) for part in (learned, follows, kept)))


def findings(scores: Scores, gained: Gains) -> list[str]:
    """What is wrong with a checkpoint, in the words above."""
    learned, follows, kept = gained.means()
    if follows < _LEAST_FOLLOWED:
        return [RUINED]
    copies = scores["memorised"]
    found = {
        NOT_LEARNED: learned < _LEAST_LEARNED,
        MEMORISED: copies is not None and copies.mean().item() > _MOST_COPIES,
        FORGOTTEN: kept < _LEAST_KEPT,
    }
    return [what for what, holds in found.items() if holds]


@dataclass(frozen=True)
class Recommendation:
    step: int
    reason: str  # one sentence


def recommend(gained: dict[int, Gains], found: dict[int, list[str]]) -> Recommendation:
    """The step to keep of all that were judged, by their gains and findings.

    Steps without a finding go before those with one.
    """
    good = {step: gained[step] for step in gained if not found[step]} or gained
    front = pareto(good)
    best = max(front, key=lambda step: front[step].product.mean().item())
    kept = min(step for step in front if not _worse(front[step], front[best]))
    learned, follows, class_kept = gained[kept].means()
    judged = f"{len(gained)} step{'s' if len(gained) > 1 else ''}"
    reason = (
        f"of {judged} kept, {kept} has the best balance: {learned:.0%} of the way from the base model to "
        f"the photos, {follows:.0%} of its obedience to prompts and {class_kept:.0%} of the class are there"
    )
    if kept != best:
        reason += f", which step {best} does not better by more than a standard error"
    if found[kept]:
        reason += "; but " + " and ".join(f"{what} ({_MENDS[what]})" for what in found[kept])
    return Recommendation(kept, reason)


def pareto(gained: dict[int, Gains]) -> dict[int, Gains]:
    """Those that no other dominates."""
    means = {step: gains.means() for step, gains in gained.items()}
    return {
        step: gained[step] for step, own in means.items() if not any(_dominates(other, own) for other in means.values())
    }


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def _worse(one: Gains, other: Gains) -> bool:
    """Whether the product is smaller by more than a standard error, seed by seed; of one seed, by anything."""
    difference = other.product - one.product
    return difference.mean().item() > standard_error(difference)


def _of(scores: Scores, name: str) -> Tensor:
    value = scores[name]
    assert value is not None, name
    return value
