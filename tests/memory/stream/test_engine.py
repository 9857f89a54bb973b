"""Streams in made-up time: what they bring and keep is what plain tensors have, and no wait can be missing."""

import random
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.memory.stream.engine import Stream
from lowvram_db.memory.stream.lanes import Why
from lowvram_db.memory.stream.made_up import MadeUpTime, Race
from lowvram_db.memory.stream.ram import Ram
from lowvram_db.memory.stream.schedule import GRANULE, Use, planned


def advance(parcel, step):
    """What stands for a computation."""
    parcel.mul_(5).add_(step + 1)


class Streamed:
    """Parcels of some bytes in RAM, their stream, and the same in plain tensors."""

    def __init__(self, uses, sizes, room, lanes, pinned=1.0):
        total = sum(-(-size // GRANULE) * GRANULE for size in sizes)
        ram = Ram(lanes, total, int(total * pinned))
        self.homes = [ram.home(size) for size in sizes]
        self.plain = [torch.arange(size).add(number).to(torch.uint8) for number, size in enumerate(sizes)]
        for home, parcel in zip(self.homes, self.plain, strict=True):
            home.memory.copy_(parcel)
        self.stream = Stream(planned(uses, sizes, room), self.homes, ram, lanes, lanes.room(room))
        self.lanes = lanes

    def use(self, use, step):
        place = self.stream.take(use.parcel, to_change=use.changes)
        assert torch.equal(place, self.plain[use.parcel])
        if use.changes:
            advance(place, step)
            advance(self.plain[use.parcel], step)
        self.stream.give_back(use.parcel, changed=use.changes)

    def check(self):
        with self.stream.at_rest():
            for home, parcel in zip(self.homes, self.plain, strict=True):
                assert torch.equal(home.memory, parcel)


def delays(seed):
    """Durations with a mean of 1 byte a unit and everything between nothing and very long."""
    generator = random.Random(seed)
    return lambda lane, size: size * generator.choice([0.0, 0.1, 1.0, 20.0]) * generator.random()


SIZES = st.lists(st.integers(1, 4 * GRANULE), min_size=1, max_size=5)


@given(SIZES, st.integers(4, 14), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**32), st.data())
def test_whatever_the_order_and_the_delays_each_use_finds_what_the_last_one_left(sizes, granules, pinned, seed, data):
    """Also where a step breaks off, leaves something out, or RAM is written meanwhile."""
    some = st.builds(Use, st.integers(0, len(sizes) - 1), st.booleans())
    uses = data.draw(st.lists(some, min_size=1, max_size=10))
    lanes = MadeUpTime(delays(seed))
    streamed = Streamed(uses, sizes, granules * GRANULE, lanes, pinned)
    for step in range(4):
        whole = data.draw(st.booleans())
        for use in uses if whole else data.draw(st.lists(st.sampled_from(uses), max_size=6)):
            streamed.use(use, step)
        if not whole:  # a step that broke off begins anew
            streamed.check()
            with streamed.stream.at_rest():
                for home, parcel in zip(streamed.homes, streamed.plain, strict=True):
                    home.memory.copy_(parcel.add_(1))
    streamed.check()
    assert lanes.card_bytes == granules * GRANULE


class Careless(MadeUpTime):
    """One wait is removed."""

    def __init__(self, removed, duration):
        super().__init__(duration)
        self.removed = removed

    def _end_of(self, waits):
        return super()._end_of([wait for wait in waits if wait.why is not self.removed])


@pytest.mark.parametrize("is_removed", [False, True])
@pytest.mark.parametrize("awaited", Why)
def test_the_removal_of_any_wait_is_a_race_that_is_seen(slow_lane, awaited, is_removed):
    """Each in turn, while what is waited for takes a hundred times as long as all else."""
    staged = awaited in (Why.FILLED, Why.SENT, Why.LANDED, Why.DRAINED)
    only_read = awaited is Why.READ
    uses = [Use(parcel, not only_read) for parcel in (0, 1, 2, 3, 0, 1)]
    lanes = Careless(awaited if is_removed else None, lambda lane, size: 100.0 if lane == slow_lane[awaited] else 1.0)

    def run():
        streamed = Streamed(uses, [GRANULE] * 4, 3 * GRANULE, lanes, pinned=0.0 if staged else 1.0)
        for step in range(2):
            for use in uses:
                streamed.use(use, step)
        streamed.check()

    with pytest.raises(AssertionError) if is_removed else nullcontext():  # a Race, or another value
        run()


def test_two_parcels_may_be_out_at_once_where_there_is_room():
    uses = [Use(0, True), Use(1, True)]
    streamed = Streamed(uses, [GRANULE] * 2, 2 * GRANULE, MadeUpTime(delays(0)))
    first, second = streamed.stream.take(0), streamed.stream.take(1)
    advance(second, 0)
    advance(first, 0)
    for parcel in (0, 1):
        streamed.stream.give_back(parcel)
        advance(streamed.plain[parcel], 0)
    streamed.check()
    narrow = Streamed(uses, [GRANULE] * 2, GRANULE, MadeUpTime(delays(0)))
    narrow.stream.take(0)
    with pytest.raises(RuntimeError, match=r"no room for parcel 1 while parcels \[0\] are out"):
        narrow.stream.take(1)


def test_nothing_rests_while_a_parcel_is_out():
    streamed = Streamed([Use(0, True), Use(1, True)], [GRANULE] * 2, 2 * GRANULE, MadeUpTime(delays(0)))
    advance(streamed.stream.take(0), 0)
    with pytest.raises(RuntimeError, match="parcel 0 is still out"), streamed.stream.at_rest():
        pass
    streamed.stream.give_back(0)
    advance(streamed.plain[0], 0)
    streamed.check()


def test_who_has_to_change_a_parcel_gets_a_visit_that_carries_it_down():
    streamed = Streamed([Use(0, False), Use(1, True), Use(0, True)], [GRANULE] * 2, 4 * GRANULE, MadeUpTime(delays(0)))
    advance(streamed.stream.take(0, to_change=True), 0)
    assert streamed.stream.may_change(0) and not streamed.stream.may_change(1)
    streamed.stream.give_back(0)
    advance(streamed.plain[0], 0)
    assert torch.equal(streamed.stream.take(0), streamed.plain[0]), "not by the visit that was passed over before"
    assert not streamed.stream.may_change(0), "the next round begins with one that reads"
    streamed.stream.give_back(0)
    streamed.check()
    reading = Streamed([Use(0, False)], [GRANULE], GRANULE, MadeUpTime(delays(0)))
    with pytest.raises(KeyError, match="no visit brings parcel 0 to be changed"):
        reading.stream.take(0, to_change=True)


def test_what_has_not_been_changed_is_not_carried_down():
    """And a change that is denied is seen."""
    lanes = MadeUpTime(delays(0))
    streamed = Streamed([Use(0, True)], [GRANULE], GRANULE, lanes)
    streamed.stream.take(0)
    streamed.stream.give_back(0, changed=False)
    streamed.check()
    assert not [done for done in lanes.timeline if done.lane == "down"]
    advance(streamed.stream.take(0), 0)
    with pytest.raises(Race, match="only to be read"):
        streamed.stream.give_back(0, changed=False)


@given(st.permutations(range(4)), st.integers(0, 2**32))
def test_neighbours_that_change_places_cost_no_copy(order, seed):
    """As a backward's gradients do, of a weight and its bias: within what has been brought already."""
    lanes = MadeUpTime(delays(seed))
    uses = [Use(parcel, True) for parcel in range(12)]
    streamed = Streamed(uses, [GRANULE] * 12, 8 * GRANULE, lanes)
    for step in range(3):
        for parcel in [0, 1, *(2 + place for place in order), *range(6, 12)]:
            streamed.use(uses[parcel], step)
    up = [done for done in lanes.timeline if done.lane == "up"]
    assert len(up) <= 3 * 12 + 8, "and what is brought for the next step"
    streamed.check()


def test_what_was_passed_over_makes_way_for_what_is_wanted():
    """It comes anew in the next round."""
    uses = [Use(parcel, True) for parcel in range(4)]
    streamed = Streamed(uses, [GRANULE] * 4, 2 * GRANULE, MadeUpTime(delays(0)))
    for step, parcels in enumerate(([1, 2, 3], [0, 3], [3, 0, 1])):
        for parcel in parcels:
            streamed.use(uses[parcel], step)
    streamed.check()


def test_another_round_may_be_followed_from_its_beginning():
    streamed = Streamed([Use(0, True), Use(1, True)], [GRANULE] * 3, 3 * GRANULE, MadeUpTime(delays(0)))
    streamed.use(Use(0, True), 0)
    others = [Use(2, False), Use(0, True)]
    streamed.stream.follow(planned(others, [GRANULE] * 3, 3 * GRANULE))
    for use in others:
        streamed.use(use, 1)
    with pytest.raises(KeyError, match="no visit brings parcel 1"):
        streamed.stream.take(1)
    streamed.check()


def test_a_parcel_that_no_visit_brings_or_that_is_not_out_is_refused():
    streamed = Streamed([Use(0, True)], [GRANULE] * 2, GRANULE, MadeUpTime(delays(0)))
    with pytest.raises(KeyError, match="no visit brings parcel 1"):
        streamed.stream.take(1)
    with pytest.raises(KeyError, match="parcel 0 has not been taken"):
        streamed.stream.give_back(0)


def test_copies_run_ahead_of_the_computation_as_far_as_there_is_room():
    """With room for three, the copies of what comes next are over when the computation before it is."""
    uses = [Use(parcel, True) for parcel in range(8)]
    lanes = MadeUpTime(lambda lane, size: 10.0 if lane == "compute" else 4.0)
    streamed = Streamed(uses, [GRANULE] * 8, 3 * GRANULE, lanes)
    for use in uses:
        streamed.use(use, 0)
    computed = [done for done in lanes.timeline if done.lane == "compute"]
    assert [done.start for done in computed] == [4.0 + 10.0 * number for number in range(8)]
