"""Visits of parcels on the card, prefetched as far as there is room; who waits for whom is said here and in ram.py.

    stream = Stream(planned(uses, sizes, room), homes, ram, lanes, lanes.room(room))
    for parcel in used_by_a_step:
        place = stream.take(parcel)  # uint8 [bytes], on the card
        ...                          # computation on it is asked for, and need not be done
        stream.give_back(parcel, changed=True)
    with stream.at_rest():
        ...                          # the homes are whole, and may be written

The order that the schedule tells decides only what is fetched early. Another one gives the same, and no later where
neighbours have changed places; what is far out of turn, as where a step is broken off and repeated, comes late.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from lowvram_db.memory.stream.lanes import Lanes, Wait, Why
from lowvram_db.memory.stream.ram import Home, Ram
from lowvram_db.memory.stream.schedule import Visit


class NoRoom(RuntimeError):
    """Too much is out at once."""


class Stream:
    """visits: of a round. homes: of all parcels, by number. room: on the card, of the lanes."""

    def __init__(self, visits: Sequence[Visit], homes: Sequence[Home], ram: Ram, lanes: Lanes, room: Tensor) -> None:
        self._visits, self._homes, self._ram, self._lanes = visits, homes, ram, lanes
        self._parcels = _carried(visits)
        self._room = room
        ram.make_stages(homes)
        self._begin()

    def _begin(self) -> None:
        """Visits are numbered on from round to round."""
        self._sent = 0  # visits whose copies up have been asked for
        self._taken = 0  # visits that have been taken or passed over
        self._overdue: list[int] = []  # visits that have been passed over, until another takes their place
        self._lent: dict[int, Tensor] = {}  # by visit: what has not been given back
        self._arrived: dict[int, Wait] = {}  # by visit
        self._free: dict[int, Wait] = {}  # by visit: until its place may be written anew
        self._at_home: dict[int, Wait] = {}  # by parcel: until its home holds what was last carried down
        self._send()

    def follow(self, visits: Sequence[Visit]) -> None:
        """Let a round be made of other visits, from its beginning. Raises RuntimeError where a parcel is out."""
        self.settle()
        self._visits, self._parcels = visits, _carried(visits)
        self._begin()

    def take(self, parcel: int, to_change: bool = False) -> Tensor:
        """The parcel, for computation that is asked for from now on: uint8 [bytes], on the card. It may change what the
        schedule says that it changes; to_change: as it has to.

        Raises KeyError for one that no visit brings so, NoRoom where too much is out; then some has to be given back.
        """
        if not any(changes or not to_change for changes in self._parcels.get(parcel, ())):
            raise KeyError(f"no visit brings parcel {parcel}{' to be changed' * to_change}")
        number = next((n for n in self._overdue if self._brings(self._visit(n), parcel, to_change)), None)
        if number is None:
            while not self._brings(self._visit(self._taken), parcel, to_change):
                self._overdue.append(self._next())
                self._send()
            number = self._next()
        else:
            self._overdue.remove(number)
        self._lent[number] = self._lanes.lend(self._place(number), [self._arrived[number]])
        return self._lent[number]

    def give_back(self, parcel: int, changed: bool = True) -> None:
        """The computation that has been asked for since take() is the last on it; what it changed is carried down, if
        the schedule says that it changes. changed: whether it can have changed anything. Raises KeyError where the
        parcel is not out."""
        number = next((n for n in self._lent if self._visit(n).parcel == parcel), None)
        if number is None:
            raise KeyError(f"parcel {parcel} has not been taken")
        self._let_go(number, changed and self._visit(number).changes)

    def may_change(self, parcel: int) -> bool:
        """Whether it is out, and the schedule says that it changes."""
        return any(visit.parcel == parcel and visit.changes for visit in map(self._visit, self._lent))

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """While the homes are read and written by others. Raises RuntimeError where a parcel is out."""
        self.settle()
        try:
            yield
        finally:
            self._begin()

    def settle(self) -> None:
        """Return when all copies are done and the homes are whole; to go on takes at_rest(). Raises RuntimeError where
        a parcel is out."""
        if self._lent:
            raise RuntimeError(f"parcel {self._visit(min(self._lent)).parcel} is still out")
        for number in (*self._overdue, *range(self._taken, self._sent)):
            self._drop(number)
        # Also for the places, for visits are then numbered anew.
        events = (wait.event for waits in (self._free, self._at_home) for wait in waits.values())
        self._lanes.settle([Wait(Why.AT_REST, event) for event in events])

    def _visit(self, number: int) -> Visit:
        return self._visits[number % len(self._visits)]

    @staticmethod
    def _brings(visit: Visit, parcel: int, to_change: bool) -> bool:
        return visit.parcel == parcel and (visit.changes or not to_change)

    def _place(self, number: int) -> Tensor:
        visit = self._visit(number)
        return self._room[visit.start :][: self._homes[visit.parcel].memory.nbytes]

    def _next(self) -> int:
        """The number of the visit whose turn it is, and which has been sent for."""
        number = self._taken
        while number == self._sent and self._overdue:
            self._drop(self._overdue.pop(0))
            self._send()
        if number == self._sent:
            out = sorted(self._visit(n).parcel for n in self._lent)
            raise NoRoom(f"no room for parcel {self._visit(number).parcel} while parcels {out} are out")
        self._taken += 1
        return number

    def _drop(self, number: int) -> None:
        """Of what was brought for nothing."""
        self._free[number] = Wait(Why.READ, self._lanes.drop(self._place(number), self._arrived[number]))

    def _let_go(self, number: int, changed: bool) -> None:
        place, parcel = self._place(number), self._visit(number).parcel
        done = self._lanes.take_back(place, self._lent.pop(number), changed)
        if changed:
            for late in [other for other in self._overdue if self._visit(other).parcel == parcel]:
                self._overdue.remove(late)  # it brought what was there before
                self._drop(late)
            left, home = self._ram.down(place, self._homes[parcel], [Wait(Why.COMPUTED, done)])
            self._free[number], self._at_home[parcel] = Wait(Why.LEFT, left), Wait(Why.RETURNED, home)
        else:
            self._free[number] = Wait(Why.READ, done)
        self._send()

    def _send(self) -> None:
        """Have brought what there is room for, in its order, up to a round ahead."""
        while self._sent < self._taken + len(self._visits):
            number, visit = self._sent, self._visit(self._sent)
            before = [number - ago for ago in visit.after if ago <= number]
            renewed = [] if visit.renewed is None or visit.renewed > number else [number - visit.renewed]
            if not all(other in self._free for other in before + renewed):
                return
            home_waits = [self._at_home[visit.parcel]] if visit.parcel in self._at_home else []
            arrived = self._ram.up(
                self._homes[visit.parcel], self._place(number), home_waits, [self._free[other] for other in before]
            )
            self._arrived[number] = Wait(Why.ARRIVED, arrived)
            self._sent += 1
            self._forget(number - 2 * len(self._visits))

    def _forget(self, number: int) -> None:
        """Nothing waits any more for what is more than a round old."""
        self._arrived.pop(number, None)
        self._free.pop(number, None)


def _carried(visits: Sequence[Visit]) -> dict[int, set[bool]]:
    """The parcels that are brought, with whether they change."""
    found: dict[int, set[bool]] = {}
    for visit in visits:
        found.setdefault(visit.parcel, set()).add(visit.changes)
    return found
