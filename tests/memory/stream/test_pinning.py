"""As much of the RAM is pinned as can be, without a card."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.memory.stream import pinning
from lowvram_db.memory.stream.made_up import MadeUpTime

MIB = 2**20
GPU = torch.device("cuda")


@pytest.fixture
def pins(monkeypatch):
    """A card whose system pins so many bytes altogether."""

    def pins(most):
        class Card(MadeUpTime):
            def __init__(self, device):
                super().__init__(lambda lane, size: 0.0)
                self.left = most

            def home(self, size, pinned):
                if pinned and size > self.left:
                    raise MemoryError(f"{size} bytes cannot be pinned")
                self.left -= size * pinned
                return super().home(size, pinned)

        monkeypatch.setattr(pinning, "Cuda", Card)

    return pins


SHARES = 1, 1 / 2, 1 / 4, 1 / 8, 0


def tried_in_vain(capfd):
    return capfd.readouterr().err.count("cannot be pinned: what is not is copied once more")


@pytest.mark.parametrize("pinnable", [1.0, 0.6, 0.3, 0.0])
def test_as_much_ram_is_pinned_as_can_be(pins, capfd, pinnable):
    """Half as much in turn, where the system has refused."""
    pins(pinnable * 64 * MIB)
    ram, _ = pinning.open_ram(64 * MIB, GPU)
    pinned = sum(ram.home(MIB).pinned for _ in range(64))
    share = next(share for share in SHARES if share <= pinnable)
    assert pinned == 64 * share
    assert tried_in_vain(capfd) == SHARES.index(share)


@pytest.mark.parametrize("pinnable", [1.0, 0.6, 0.3, 0.0])
def test_piece_by_piece_too_and_what_was_refused_once_is_not_asked_for_again(pins, capfd, pinnable):
    pins(pinnable * 64 * MIB)
    pieces = pinning.Pinning(GPU)
    rams = [pieces.ram(8 * MIB) for _ in range(8)]
    pinned = sum(ram.home(MIB).pinned for ram in rams for _ in range(8))
    assert 0 <= pinnable * 64 - pinned < 1
    assert tried_in_vain(capfd) == (0 if pinnable == 1 else 4)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
def test_pieces_are_had_when_they_are_wanted_and_filled(sizes):
    """Homes apart from each other, and hardly more RAM than they take."""
    made = []

    class Card(MadeUpTime):
        def __init__(self, device):
            super().__init__(lambda lane, size: 0.0)

        def home(self, size, pinned):
            made.append(size)
            return super().home(size, pinned)

    whole = [-(-size // 512) * 512 for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinning, "Cuda", Card)
        patch.setattr(pinning, "PIECE", 4096)
        patch.setattr(pinning, "check_free", lambda *_: None)
        ram, _ = pinning.open_ram(sum(whole), GPU)
        assert not sum(made)
        homes = []
        for number, size in enumerate(sizes):
            homes.append(ram.home(size))
            homes[-1].memory.fill_(number)
            assert sum(made) <= sum(whole[: number + 1]) * 2 + 4096, "had before it is wanted"
    assert all(home.pinned and home.memory.nbytes == size for home, size in zip(homes, sizes, strict=True))
    assert all((home.memory == number).all() for number, home in enumerate(homes)), "no two share a byte"
