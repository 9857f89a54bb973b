"""What of RAM is on the card when: a plain list, made once from the order in which a step uses it.

A parcel is what is moved as one. A step that uses parcels in a known order is a round of visits, each at its own place
in one room on the card; the next step is the same round again. Nothing here copies anything: a schedule can be
printed, simulated and tested alone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from lowvram_db.memory.size import gib

GRANULE = 512  # bytes: where a visit may begin, as what the allocator hands out does

Key = TypeVar("Key", bound=Hashable)


def whole_granules(size: int) -> int:
    """Bytes that a parcel of `size` bytes takes."""
    return -(-size // GRANULE) * GRANULE


class Use(NamedTuple):
    parcel: int
    changes: bool  # whether it comes back other than it went up
    until: int = 0  # it is out until the use that comes so many later is over


class Visit(NamedTuple):
    """A use with its place. Other visits are named by how many visits ago they were, over the end of a round too."""

    parcel: int
    changes: bool
    until: int
    start: int  # bytes into the room
    size: int  # bytes, a multiple of GRANULE
    after: tuple[int, ...]  # whose places it takes, the latest of each byte
    renewed: int | None  # which last changed this parcel; None where nothing does

    def __str__(self) -> str:
        takes = ", ".join(map(str, self.after))
        return f"parcel {self.parcel}{' changed' * self.changes} at {self.start} + {self.size}, takes from {takes} ago"


def planned(uses: Sequence[Use], sizes: Sequence[int], room: int) -> list[Visit]:
    """The visits of a round, placed one behind the other and from the room's beginning where its end is reached.

    uses: in their order. sizes: bytes of each parcel. room: bytes. Raises ValueError where a parcel is larger than it.
    """
    rounded = [whole_granules(sizes[use.parcel]) for use in uses]
    if rounded and max(rounded) > room:
        raise ValueError(f"a room of {gib(room)} is too small for a parcel of {gib(max(rounded))}")
    starts, end = [], 0
    for size in rounded:
        start = end if end + size <= room else 0
        starts.append(start)
        end = start + size
    changed = {use.parcel: number - len(uses) for number, use in enumerate(uses) if use.changes}  # in the round before
    takes, visits = _takes(starts, rounded), []
    for number, use in enumerate(uses):
        renewed = number - changed[use.parcel] if use.parcel in changed else None
        visits.append(Visit(*use, starts[number], rounded[number], takes[number], renewed))
        if use.changes:
            changed[use.parcel] = number
    return visits


def _takes(starts: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """For each visit of a round, how many visits ago those were that last had each byte of its place."""
    held: deque[tuple[int, int, int]] = deque()  # bytes from, to, and whose: in the order in which they are taken next
    taken = []
    for number in range(-len(starts), len(starts)):  # the round before has had all places
        start = starts[number]
        end = start + sizes[number]
        if start == 0:
            held = deque(sorted(held))
        after = []
        while held and start <= held[0][0] < end:
            _, until, visit = held.popleft()
            after.append(number - visit)
            if until > end:
                held.appendleft((end, until, visit))
        held.append((start, end, number))
        taken.append(tuple(sorted(set(after))))
    return taken[len(starts) :]


def uses_of_a_step(
    events: Iterable[tuple[Key, bool]], weights: Mapping[Key, int], states: Mapping[Key, int]
) -> list[list[Use]]:
    """Of the parcels that hold weights, and states of an optimizer: by the event that each belongs to.

    events: what a step does with a weight, in order: True, a layer reads it in a forward pass; False, its gradient is
    complete. Who reads a weight for the second time recomputes, and has it until it has been stepped.
    """
    found: list[list[Use]] = []
    reads: Counter[Key] = Counter()
    begun: dict[Key, tuple[int, int]] = {}  # the uses that last until the step: their event and number
    number = 0
    for key, is_read in events:
        weight, state = weights.get(key), None if is_read else states.get(key)
        reads[key] += is_read
        uses = []
        if weight is not None and key not in begun:
            if not is_read or reads[key] > 1:
                begun[key] = len(found), number
            uses.append(Use(weight, changes=key in begun))
        if state is not None:
            uses.append(Use(state, changes=True))
        found.append(uses)
        number += len(uses)
        if weight is not None and not is_read:
            event, first = begun[key]
            found[event][0] = Use(weight, changes=True, until=number - 1 - first)
    return found


def least_room(uses: Sequence[Use], sizes: Sequence[int]) -> int:
    """Bytes in which no use waits for a parcel that is out, and one comes while another is used."""
    rounded = [whole_granules(sizes[use.parcel]) for use in uses]
    longest = max(sum(rounded[number : number + use.until + 1]) for number, use in enumerate(uses))
    return longest + max(rounded)  # so much is left over at the room's end


def arrivals(parameters: Iterable[nn.Parameter], backward: Callable[[], object]) -> list[nn.Parameter]:
    """The order in which parameters' gradients become complete in a backward; without values it is the same."""
    order: dict[nn.Parameter, None] = {}

    def note(parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        order.setdefault(parameter)

    hooks = [parameter.register_post_accumulate_grad_hook(note) for parameter in parameters]
    try:
        backward()
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)
