"""When each step of a schedule ends, from what its copies and computations take: a model of the engine, alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lowvram_db.memory.stream.schedule import Visit


class Timing(NamedTuple):
    """Seconds of a visit."""

    before: float  # computation since the visit before, which does not wait for this one
    own: float  # and what does
    up: float  # of its copies
    down: float


def simulated(visits: Sequence[Visit], times: Sequence[Timing], rounds: int) -> list[float]:
    """When each of so many rounds ends: seconds. All RAM is pinned, and the host is always ahead."""
    free: dict[int, float] = {}  # since when each visit's place is
    out: dict[int, list[int]] = {}  # by the visit at whose end they are let go
    up = down = computed = 0.0  # until when each is busy
    ends = []
    for number in range(rounds * len(visits)):
        visit, time = visits[number % len(visits)], times[number % len(visits)]
        waits = [free[number - ago] for ago in (*visit.after, visit.renewed or 0) if 0 < ago <= number]
        up = max([up, *waits]) + time.up
        computed = max(computed + time.before, up) + time.own
        out.setdefault(number + visit.until, []).append(number)
        for gone in reversed(out.pop(number, [])):  # the last that came is the first
            changed = visits[gone % len(visits)].changes
            free[gone] = computed
            if changed:
                down = free[gone] = max(down, computed) + times[gone % len(visits)].down
        if (number + 1) % len(visits) == 0:
            ends.append(computed)
    return ends
