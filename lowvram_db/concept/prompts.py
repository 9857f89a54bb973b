"""Prompts that are drawn, each with its share of the draws."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

DRAWS = 2**31  # equally likely numbers that a draw is one of


@dataclass(frozen=True)
class Choice:
    """Prompts with their weights, which need not add up to 1; one of them at least is above zero."""

    weights: dict[str, float]

    def at(self, draw: int) -> str:
        """The prompt that a number from 0 to DRAWS - 1 stands for."""
        return self._prompts[bisect_right(self._ends, draw / DRAWS)]

    @cached_property
    def _prompts(self) -> list[str]:
        return list(self.weights)

    @cached_property
    def _ends(self) -> list[float]:
        """Where the share of each prompt ends; the last of them at 1 exactly, which no draw reaches."""
        ends = list(accumulate(self.weights.values()))
        return [end / ends[-1] for end in ends]
