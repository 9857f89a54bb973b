"""As much of the RAM is pinned as can be, without a card."""

import pytest
import torch

from lowvram_db.memory.stream import pinning
from lowvram_db.memory.stream.made_up import MadeUpTime


@pytest.mark.parametrize("pinnable", [1.0, 0.6, 0.3, 0.0])
def test_as_much_ram_is_pinned_as_can_be(monkeypatch, capfd, pinnable):
    """Half as much in turn, where the system has refused; with threads for the stages where any is not."""
    total, asked = 64 * 2**20, []

    class Card(MadeUpTime):
        def __init__(self, device, staged):
            super().__init__(lambda lane, size: 0.0)
            self.staged, self.closed = staged, False
            asked.append(self)

        def home(self, size, pinned):
            if pinned and size > pinnable * total:
                raise MemoryError(f"{size} bytes cannot be pinned")
            return super().home(size, pinned)

        def close(self):
            self.closed = True

    monkeypatch.setattr(pinning, "Cuda", Card)
    ram, lanes = pinning.open_ram(total, torch.device("cuda"))
    homes = [ram.home(2**20) for _ in range(64)]
    pinned = sum(home.pinned for home in homes)
    assert pinned == 64 * next(share for share in (1, 1 / 2, 1 / 4, 0) if share <= pinnable)
    assert lanes is asked[-1] and lanes.staged == (pinned < 64)
    assert [card.closed for card in asked] == [True] * (len(asked) - 1) + [False]
    assert capfd.readouterr().err.count("cannot be pinned: what is not is copied once more") == len(asked) - 1
