"""Schedules, against the room byte by byte; the order of gradients, with and without values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram_db.memory.stream.schedule import GRANULE, Use, arrivals, planned

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
