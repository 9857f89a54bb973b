"""Pictures of several guidance scales in one batch, though a diffusers pipeline takes one number for all of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Scales(float):
    """A guidance scale for each picture of a batch: to those who compare it the largest, by which a pipeline sees
    whether to guide; to those who multiply by it a number for each row of theirs.

    A row of a scale up to 1, which is not guided in a batch of its own, is in a batch that is guided what the prompt
    alone predicts.
    """

    def __new__(cls, scales: Sequence[float]) -> Scales:
        return super().__new__(cls, max(scales))

    def __init__(self, scales: Sequence[float]) -> None:
        self._rows = [max(scale, 1.0) for scale in scales]

    def __mul__(self, steered: Tensor) -> Tensor:  # type: ignore[override]  # which nothing but tensors come to
        """[B, ...] -> the same. Row by row: a column of scales in half precision would round them."""
        return torch.cat([scale * row for scale, row in zip(self._rows, steered.split(1), strict=True)])
