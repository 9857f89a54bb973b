"""From embeddings of pictures to scores with intervals: arithmetic on similarities, and no network.

Embeddings have length 1, so a similarity is a product. Every score is taken for each seed by itself; the interval is
that of their mean, 95% by Student's t. A checkpoint's seeds are every checkpoint's, so that they can be compared pair
by pair.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
MOST_SEEDS = len(_T) + 1


@dataclass(frozen=True)
class Photos:
    """What pictures are compared with."""

    references: Tensor  # embeddings [R, D] of those that tell how alike a picture is
    trained: Tensor  # appearances [T, E] of those that could have been memorised
    similarity: float  # how alike a reference and any other photo are, in the mean

    @classmethod
    def of(cls, references: Tensor, others: Tensor, trained: Tensor) -> "Photos":
        """others: embeddings [O, D] of the photos that are no references. trained: appearances [T, E]."""
        everything = torch.cat([references, others])
        among = references @ everything.T
        pairs = among.sum() - among.diagonal().sum()
        count = among.numel() - len(references)
        return cls(references, trained, (pairs / count).item() if count else 1.0)


@dataclass(frozen=True)
class Drawn:
    """What was seen of one model's pictures."""

    subject: Tensor  # embeddings [P, S, D] of the subject's prompts by seed
    appearance: Tensor  # of the same pictures, [P, S, E]: what a copy has in common with its original
    agreement: Tensor | None  # with their prompts, [P, S]
    plain: Tensor  # embeddings [C, S, D] of the class prompt, C a seed


Scores = dict[str, Tensor | None]  # a value for each seed, float32 [S]


def scores(drawn: Drawn, base: Drawn, photos: Photos) -> Scores:
    """The scores of a model's pictures by seed; those of `base` start from the same noise."""
    return {
        "subject": (drawn.subject @ photos.references.T).mean((0, 2)),
        "prompt": None if drawn.agreement is None else drawn.agreement.mean(0),
        "class_likeness": (drawn.plain @ photos.references.T).mean((0, 2)),
        "class_diversity": _diversity(drawn.plain) / _diversity(base.plain).mean(),
        "memorised": _copies(drawn.appearance, photos.trained),
    }


def _diversity(plain: Tensor) -> Tensor:
    """The mean distance (1 - cosine) between the pictures of one seed: [C, S, D] -> [S]."""
    by_seed = plain.transpose(0, 1)
    count = by_seed.shape[1]
    among = (by_seed @ by_seed.mT).sum((1, 2)) - by_seed.square().sum((1, 2))
    return 1 - among / (count * (count - 1))


def _copies(appearance: Tensor, trained: Tensor) -> Tensor | None:
    """The share of pictures that are nearer to a photo than any two photos are to each other: [P, S, E] -> [S]."""
    if len(trained) < 2:
        return None
    among = (trained @ trained.T).fill_diagonal_(-1)
    return ((appearance @ trained.T).amax(2) > among.max()).float().mean(0)


def interval(values: Tensor | None) -> dict[str, Any] | None:
    """Mean, 95% interval and the values themselves of a score by seed; of one seed there is no interval."""
    if values is None:
        return None
    mean, count, by_seed = values.mean().item(), len(values), values.tolist()
    if count == 1:
        return {"mean": mean, "low": None, "high": None, "by_seed": by_seed}
    half = _T[count - 2] * standard_error(values)
    return {"mean": mean, "low": mean - half, "high": mean + half, "by_seed": by_seed}


def standard_error(values: Tensor) -> float:
    """Of a mean over seeds; 0 where there is one."""
    return 0.0 if len(values) < 2 else values.std().item() / len(values) ** 0.5
