"""Streams of a real card: what test_engine.py finds in made-up time holds of its copy engines, and is seen to break."""

import gc
import itertools
import random
import time

import pytest
import torch

from lowvram_db.memory.stream.cuda import Cuda
from lowvram_db.memory.stream.engine import Stream
from lowvram_db.memory.stream.lanes import Why
from lowvram_db.memory.stream.ram import Ram
from lowvram_db.memory.stream.schedule import Use, planned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")

MIB = 2**20  # smaller copies may be done before they are waited for
CYCLES = 20_000_000  # some 10 ms of a card's clock


class Slow(Cuda):
    """One lane, or the computation, takes 10 ms a parcel, and one wait may be removed."""

    def __init__(self, slow=None, removed=None):
        super().__init__(torch.device("cuda", torch.cuda.current_device()))
        self.slow, self.removed = slow, removed

    def left(self, waits):
        return [wait for wait in waits if wait.why is not self.removed]

    def copy(self, lane, destination, source, waits):
        if lane == self.slow and lane in self._streams:
            with torch.cuda.stream(self._streams[lane]):
                torch.cuda._sleep(CYCLES)
        elif lane == self.slow:
            self._threads[lane].submit(time.sleep, 0.01)
        return super().copy(lane, destination, source, self.left(waits))

    def lend(self, place, waits):
        lent = super().lend(place, self.left(waits))
        if self.slow == "compute":
            torch.cuda._sleep(CYCLES)
        return lent

    def settle(self, waits):
        super().settle(self.left(waits))


def wrong_after(uses, sizes, room, lanes, pinned, steps=3):
    """How many uses found other than the one before had left, and how many homes end so. The host runs ahead of the
    card, as in training."""
    total = sum(sizes)
    ram = Ram(lanes, total, int(total * pinned))
    homes = [ram.home(size) for size in sizes]
    plain = [torch.arange(size).add(number).to(torch.uint8) for number, size in enumerate(sizes)]
    for home, parcel in zip(homes, plain, strict=True):
        home.memory.copy_(parcel)
    stream, found = Stream(planned(uses, sizes, room), homes, ram, lanes, lanes.room(room)), []
    for step in range(steps):
        for use in uses:
            place = stream.take(use.parcel)
            found.append((place.clone(), plain[use.parcel].clone()))
            if use.changes:
                for parcel in (place, plain[use.parcel]):
                    parcel.mul_(5).add_(step + 1)
            stream.give_back(use.parcel)
    with stream.at_rest():
        ends = [(home.memory.clone(), parcel) for home, parcel in zip(homes, plain, strict=True)]
    lanes.close()
    return sum(not torch.equal(here.cpu(), there) for here, there in (*found, *ends))


@pytest.mark.parametrize("pinned", [1.0, 0.5, 0.0])
def test_each_use_finds_what_the_last_one_left(pinned):
    generator = random.Random(0)
    for slow in (None, "up", "down", "compute", *(("fill", "drain") if pinned < 1 else ())):
        sizes = [MIB * generator.randint(1, 8) for _ in range(6)]
        uses = [Use(parcel, True) for parcel in generator.sample(range(6), 6)]
        lanes = Slow(slow)
        assert wrong_after(uses, sizes, 2 * max(sizes), lanes, pinned) == 0, slow


@pytest.mark.parametrize(("awaited", "is_removed"), itertools.product(Why, [False, True]))
def test_the_removal_of_any_wait_is_a_race_on_a_card_too(slow_lane, awaited, is_removed):
    staged = awaited in (Why.FILLED, Why.SENT, Why.LANDED, Why.DRAINED)
    uses = [Use(parcel, awaited is not Why.READ) for parcel in (0, 1, 2, 3, 0, 1)]
    lanes = Slow(slow_lane[awaited], awaited if is_removed else None)
    wrong = wrong_after(uses, [MIB] * 4, 3 * MIB, lanes, 0.0 if staged else 1.0)
    assert (wrong > 0) == is_removed


def test_memory_is_pinned_no_longer_than_its_lanes_are_there(monkeypatch):
    """What is freed while it is pinned has wrong bytes copied for whoever gets its addresses next."""
    memory = torch.zeros(2 * MIB, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *_, **__: memory)
        lanes = Slow()
        lanes.home(MIB, pinned=True)
        del lanes
        gc.collect()
        other = Slow()
        other.home(MIB, pinned=True)  # which was refused, were it pinned still
        other.close()


def test_what_cannot_be_pinned_is_no_error_of_the_next_kernel(monkeypatch):
    lanes, memory = Slow(), torch.zeros(2 * MIB, dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *_, **__: memory)
        lanes.home(MIB, pinned=True)
        with pytest.raises(MemoryError, match=r"RAM cannot be pinned \(CUDA error"):
            lanes.home(MIB, pinned=True)
    assert torch.full((8,), 2.0, device="cuda").sum().item() == 16
    lanes.close()
