"""What is only read comes right from the first round on, and ahead of time from the second."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.memory.stream.engine import Stream
from lowvram_db.memory.stream.made_up import MadeUpTime
from lowvram_db.memory.stream.ram import Ram
from lowvram_db.memory.stream.reading import Rounds
from lowvram_db.memory.stream.schedule import GRANULE


def begun(sizes, room, duration):
    lanes = MadeUpTime(duration)
    ram = Ram(lanes, GRANULE * 9 * len(sizes), GRANULE * 9 * len(sizes))
    homes = [ram.home(size) for size in sizes]
    for number, home in enumerate(homes):
        home.memory.fill_(number + 1)
    rounds = Rounds(Stream([], homes, ram, lanes, lanes.room(room)), sizes, room)
    return rounds, rounds._stream, lanes


@given(st.lists(st.integers(1, 3 * GRANULE), min_size=1, max_size=6), st.integers(3, 12), st.data())
def test_each_reading_finds_its_parcel(sizes, granules, data):
    """Also where a later round is another one, or begins anew halfway."""
    rounds, stream, _ = begun(sizes, granules * GRANULE, lambda lane, size: size / 100)
    first = data.draw(st.permutations(range(len(sizes))))
    for _ in range(4):
        for parcel in data.draw(st.sampled_from([first, first, first[::-1]])):
            place = rounds.take(parcel)
            assert torch.equal(place, torch.full((sizes[parcel],), parcel + 1, dtype=torch.uint8))
            stream.give_back(parcel, changed=False)
            if data.draw(st.integers(0, 9)) == 0:
                rounds.begin()


def test_from_the_second_round_on_copies_run_ahead():
    rounds, stream, lanes = begun([GRANULE] * 6, 3 * GRANULE, lambda lane, size: 10.0 if lane == "compute" else 4.0)
    waited = []
    for _ in range(3):
        for parcel in (2, 0, 5, 3, 1, 4):
            before = lanes.now
            rounds.take(parcel)
            stream.give_back(parcel, changed=False)
            waited.append(lanes.now - before)
    first, *_, last = (sum(waited[n : n + 6]) for n in (0, 6, 12))
    assert first >= 6 * 4.0 + 5 * 10.0, "each copy is asked for when the computation before it is over"
    assert last == 6 * 10.0, "and then beside it"
