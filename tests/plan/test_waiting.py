"""What a step waits for copies, where that can be said by hand."""

import pytest
import torch

from lowvram_db.plan.waiting import ASSUMED, BEGIN, Passage, Rates, rates, waiting

MIB = 2**20
FAST = Rates(1e12, 1e9, 1e9, "a test")
SLOW_DOWN = Rates(1e12, 1e9, 0.5e9, "a test")


@pytest.mark.parametrize(
    ("given", "flops", "seconds"),
    [
        (FAST, 0, "up"),  # nothing to hide behind: the copies one after the other, both ways at once
        (SLOW_DOWN, 0, "down"),
        (FAST, 10**12, 0),
    ],
)
def test_copies_hide_behind_arithmetic_or_are_waited_for(given, flops, seconds):
    passages = [Passage(MIB, flops * number // 64) for number in range(1, 65)]
    lanes = {"up": 64 * (BEGIN + MIB / given.up), "down": 64 * (BEGIN + MIB / given.down), 0: 0}
    assert waiting(passages, 1, given) == pytest.approx(lanes[seconds], abs=0.02 * lanes["down"])


def test_without_a_card_or_for_a_larger_one_rates_are_assumed_and_said_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rates(None) == ASSUMED
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 8 * 2**30))
    assert rates(12 * 2**30) == ASSUMED
    assert "24 GB/s up and 24 GB/s down" in str(ASSUMED) and "assumed: an RTX 4070" in str(ASSUMED)
