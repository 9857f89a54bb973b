"""Where parcels live when not all RAM can be pinned."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.memory.stream.made_up import MadeUpTime
from lowvram_db.memory.stream.ram import Ram
from lowvram_db.memory.stream.schedule import GRANULE


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(0, 120))
def test_never_more_is_pinned_than_asked_for_and_all_of_it_is_spread(granules, percent):
    total = sum(granules) * GRANULE
    ram = Ram(MadeUpTime(lambda lane, size: 0.0), total, total * percent // 100)
    homes = [ram.home(size * GRANULE) for size in granules]
    assert [home.memory.nbytes for home in homes] == [size * GRANULE for size in granules]
    used = accumulate(size * GRANULE * home.pinned for size, home in zip(granules, homes, strict=True))
    seen = accumulate(size * GRANULE for size in granules)
    for pinned, so_far in zip(used, seen, strict=True):
        share = so_far * min(percent, 100) / 100
        assert share - 20 * GRANULE - 1 <= pinned <= share
    assert all(home.pinned for home in homes) or percent < 100
    places = [(h.memory.data_ptr(), h.memory.nbytes) for h in homes if h.pinned]
    assert all(a + size <= b for (a, size), (b, _) in pairwise(places)), "they share no memory"
    with pytest.raises(MemoryError, match="where there was to be room for"):
        ram.home(1)
