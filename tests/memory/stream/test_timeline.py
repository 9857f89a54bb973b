"""The model of a steady step, against the engine itself in made-up time."""

from collections import deque
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.memory.stream.engine import Stream
from lowvram_db.memory.stream.made_up import MadeUpTime
from lowvram_db.memory.stream.ram import Ram
from lowvram_db.memory.stream.schedule import GRANULE, Use, least_room, planned, uses_of_a_step
from lowvram_db.memory.stream.timeline import Timing, simulated

ROUNDS = 3
SECONDS = st.integers(0, 20).map(float)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_each_step_ends_when_the_engines_does(granules, data):
    """Also where a step has a parcel more than once."""
    sizes = [GRANULE * count for count in granules]
    used = st.tuples(st.integers(0, len(sizes) - 1), st.booleans(), SECONDS, SECONDS, SECONDS, SECONDS)
    visited = data.draw(st.lists(used, min_size=1, max_size=6))
    uses, times = [Use(*use) for *use, _, _, _, _ in visited], [Timing(*seconds) for _, _, *seconds in visited]
    assert_alike(uses, times, sizes, GRANULE * data.draw(st.integers(3, 12)))


@given(st.lists(st.tuples(st.integers(1, 3), *[SECONDS] * 4), min_size=2, max_size=6), st.data())
def test_also_where_weights_wait_for_their_step(layers, data):
    """Of blocks that recompute: forward, then from the last on what recomputes and steps each."""
    states, weights = ({p: number + first for p, number in enumerate(range(len(layers)))} for first in (0, len(layers)))
    cut = data.draw(st.integers(1, len(layers)))
    backward = [
        (p, is_read)
        for block in (range(cut, len(layers)), range(cut))
        for is_read in (True, False)
        for p in (block if is_read else reversed(block))
    ]
    events = [*((p, True) for p in weights), *backward]
    uses = list(chain.from_iterable(uses_of_a_step(events, weights, states)))
    seconds = [Timing(*layers[use.parcel % len(layers)][1:]) for use in uses]
    sizes = [GRANULE * count for count, *_ in layers] * 2
    assert_alike(uses, seconds, sizes, least_room(uses, sizes) + GRANULE * data.draw(st.integers(0, 4)))


def assert_alike(uses, times, sizes, room):
    visits, computing, asked = planned(uses, sizes, room), deque(), {"up": 0, "down": 0}
    leaving = [[n for n in reversed(range(len(uses))) if n + uses[n].until == end] for end in range(len(uses))]
    down = [number for gone in leaving for number in gone if uses[number].changes]

    def duration(lane, size):
        if lane == "compute":
            return computing.popleft()
        asked[lane] += 1
        number = (asked[lane] - 1) % len(uses if lane == "up" else down)
        return times[number].up if lane == "up" else times[down[number]].down

    lanes = MadeUpTime(duration)
    ram = Ram(lanes, sum(sizes), sum(sizes))
    stream = Stream(visits, [ram.home(size) for size in sizes], ram, lanes, lanes.room(room))
    for _ in range(ROUNDS):
        for use, time, gone in zip(uses, times, leaving, strict=True):
            computing.append(time.before)
            lanes.work()
            stream.take(use.parcel)
            computing.append(time.own)
            lanes.work()
            for number in gone:
                computing.append(0.0)
                stream.give_back(uses[number].parcel)
    ends = [done.end for done in lanes.timeline if done.lane == "compute" and done.size]
    assert simulated(visits, times, ROUNDS) == ends[len(uses) - 1 :: len(uses)]
