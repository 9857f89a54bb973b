"""What a step waits for copies, where that can be said by hand."""

import pytest
import torch
from torch import nn

from lowvram_db.plan.waiting import ASSUMED, BEGIN, Rates, rates, waiting
from lowvram_db.train.strategy import Strategy
from lowvram_db.train.streaming import moving

FAST = Rates(1e12, 1e9, 1e9, "a test")
SLOW_DOWN = Rates(1e12, 1e9, 0.5e9, "a test")
LAYERS, MIB = 64, 2**20


@pytest.mark.parametrize("weights", [0, 4, 8])
@pytest.mark.parametrize(
    ("given", "flops", "lane"),
    [
        (FAST, 0, "up"),  # nothing to hide behind: the copies one after the other, both ways at once
        (SLOW_DOWN, 0, "down"),
        (FAST, 10**13, ""),
    ],
)
def test_copies_hide_behind_arithmetic_or_are_waited_for(given, flops, lane, weights):
    """Of layers that are recomputed one by one: a weight goes up twice and its state once, and both come down once,
    when the forward pass is over."""
    layers = {nn.Parameter(torch.empty(512, 1024, dtype=torch.bfloat16)): nn.Module() for _ in range(LAYERS)}
    backward = [(p, is_read) for p in reversed(layers) for is_read in (True, False)]
    events = [*((p, True) for p in layers), *backward]
    what = moving(Strategy(1, 1, streamed=8 if weights else 7, weights=weights), events, layers, "bf16")
    moved, lent = len(what.states), len(what.weights)
    assert lent == LAYERS * weights // 8
    copies = {"up": (moved + 2 * lent, what.carried[0]), "down": (moved + lent, what.carried[1])}
    rates = {"up": given.up, "down": given.down}
    lanes = {name: count * BEGIN + size / rates[name] for name, (count, size) in copies.items()} | {"": 0.0}
    lanes["down"] += lent * (BEGIN + MIB / given.up)
    done = [flops * number // len(what.events) for number in range(1, len(what.events) + 1)]
    assert waiting(what, done, given) == pytest.approx(lanes[lane], abs=0.05 * lanes["down"])


def test_without_a_card_or_for_a_larger_one_rates_are_assumed_and_said_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rates(None) == ASSUMED
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 8 * 2**30))
    assert rates(12 * 2**30) == ASSUMED
    assert "24 GB/s up and 24 GB/s down" in str(ASSUMED) and "assumed: an RTX 4070" in str(ASSUMED)
