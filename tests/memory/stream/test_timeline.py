"""The model of a steady step, against the engine itself in made-up time."""

from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.memory.stream.engine import Stream
from lowvram_db.memory.stream.made_up import MadeUpTime
from lowvram_db.memory.stream.ram import Ram
from lowvram_db.memory.stream.schedule import GRANULE, Use, planned
from lowvram_db.memory.stream.timeline import Timing, simulated

ROUNDS = 3
SECONDS = st.integers(0, 20).map(float)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_each_step_ends_when_the_engines_does(granules, data):
    """Also where a step has a parcel more than once."""
    sizes = [GRANULE * count for count in granules]
    used = st.tuples(st.integers(0, len(sizes) - 1), SECONDS, SECONDS, SECONDS, SECONDS)
    visited = data.draw(st.lists(used, min_size=1, max_size=6))
    uses, times = [Use(parcel, True) for parcel, *_ in visited], [Timing(*seconds) for _, *seconds in visited]
    room = GRANULE * data.draw(st.integers(3, 12))
    visits = planned(uses, sizes, room)
    asked = {"compute": 0, "up": 0, "down": 0}

    def duration(lane, size):
        number = asked[lane]
        asked[lane] += 1
        if lane != "compute":
            return getattr(times[number % len(times)], lane)
        time = times[number // 2 % len(times)]
        return time.own if size else time.before

    lanes = MadeUpTime(duration)
    ram = Ram(lanes, sum(sizes), sum(sizes))
    stream = Stream(visits, [ram.home(size) for size in sizes], ram, lanes, lanes.room(room))
    for _ in range(ROUNDS):
        for use in uses:
            lanes.work()
            stream.take(use.parcel)
            stream.give_back(use.parcel)
    ends = [done.end for done in lanes.timeline if done.lane == "compute" and done.size]
    assert simulated(visits, times, ROUNDS) == ends[len(uses) - 1 :: len(uses)]
