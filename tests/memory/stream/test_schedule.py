"""Schedules, against the room byte by byte; the order of gradients, with and without values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram_db.memory.stream.schedule import GRANULE, Use, arrivals, least_room, planned, uses_of_a_step

SIZES = st.lists(st.integers(1, 5 * GRANULE), min_size=1, max_size=6)


@given(SIZES, st.data())
def test_every_visit_knows_who_last_had_its_bytes_and_who_last_changed_its_parcel(sizes, data):
    some = st.builds(Use, st.integers(0, len(sizes) - 1), st.booleans())
    uses = data.draw(st.lists(some, min_size=1, max_size=12))
    room = GRANULE * data.draw(st.integers(5, 20))
    visits = planned(uses, sizes, room)
    owner: dict[int, int] = {}
    changed: dict[int, int] = {}
    for number in range(3 * len(uses)):
        visit = visits[number % len(uses)]
        assert (visit.parcel, visit.changes, visit.until) == uses[number % len(uses)]
        assert visit.size >= sizes[visit.parcel] and visit.start + visit.size <= room
        place = range(visit.start, visit.start + visit.size, GRANULE)
        if number >= 2 * len(uses):  # what came before is a whole round
            assert visit.after == tuple(sorted({number - owner[byte] for byte in place}))
            assert visit.renewed == (number - changed[visit.parcel] if visit.parcel in changed else None)
        owner |= dict.fromkeys(place, number)
        if visit.changes:
            changed[visit.parcel] = number


def test_a_room_smaller_than_a_parcel_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"room of 1\.00 GiB is too small for a parcel of 2\.00 GiB"):
        planned([Use(0, True)], [2**31], 2**30)


def test_a_visit_can_be_read():
    (visit,) = planned([Use(0, True)], [700], 2048)
    assert str(visit) == "parcel 0 changed at 0 + 1024, takes from 1 ago"


def test_who_reads_a_weight_again_has_it_until_its_step():
    """Two layers of a block that recomputes, and one beside it: "c" of the latter, whose state is on the card."""
    events = [("a", 1), ("b", 1), ("c", 1), ("c", 0), ("a", 1), ("b", 1), ("b", 0), ("d", 0), ("a", 0)]
    weights, states = {"a": 10, "b": 11, "c": 12}, {"a": 0, "b": 1, "d": 3}
    uses = uses_of_a_step([(key, bool(is_read)) for key, is_read in events], weights, states)
    assert uses == [
        [Use(10, False)], [Use(11, False)], [Use(12, False)],
        [Use(12, True)],
        [Use(10, True, until=4)], [Use(11, True, until=1)],
        [Use(1, True)],
        [Use(3, True)],
        [Use(0, True)],
    ]  # fmt: skip
    assert uses_of_a_step([("a", False)], {"a": 1}, {"a": 0}) == [[Use(1, True, until=1), Use(0, True)]]


@given(SIZES, st.data())
def test_in_the_least_room_no_use_waits_for_what_is_out(sizes, data):
    """Byte by byte: no place is that of another which is still out."""
    stays = st.integers(0, 3)
    uses = [Use(data.draw(st.integers(0, len(sizes) - 1)), True, data.draw(stays)) for _ in range(8)]
    uses = [use._replace(until=min(use.until, 7 - number)) for number, use in enumerate(uses)]
    visits = planned(uses, sizes, least_room(uses, sizes))
    for number in range(2 * len(uses)):
        visit = visits[number % 8]
        for ago in range(1, 4):
            other = visits[(number - ago) % 8]
            if number >= ago and other.until >= ago:
                assert visit.start + visit.size <= other.start or other.start + other.size <= visit.start


def test_gradients_arrive_in_the_same_order_without_values():
    def order():
        layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        names = {p: name for name, p in layers.named_parameters()}
        found = arrivals(names, lambda: layers[0](layers[2](layers[1](torch.ones(1, 4)))).sum().backward())
        assert all(p._post_accumulate_grad_hooks is None or not p._post_accumulate_grad_hooks for p in names)
        return [names[p].split(".")[0] for p in found]

    with FakeTensorMode():
        traced = order()
    assert traced == order() == ["0", "0", "2", "2", "1", "1"]
