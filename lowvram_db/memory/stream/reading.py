"""Rounds that nobody has planned: what is only read, in an order that is found out in the first of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lowvram_db.memory.stream.engine import Stream
from lowvram_db.memory.stream.schedule import Use, Visit, planned


class Rounds:
    """Of a stream's parcels. The first round brings each when it is asked for; those that follow are prefetched.

    sizes: bytes of each parcel, by its number. room: of the stream, in bytes.
    """

    def __init__(self, stream: Stream, sizes: Sequence[int], room: int) -> None:
        self._stream, self._sizes, self._room = stream, sizes, room
        self._found: list[int] = []  # in the order in which they were asked for
        self._visits: list[Visit] = []  # once it is known
        self._known: set[int] = set()  # whom they bring

    def begin(self) -> None:
        """The next parcel is the first of a round. Raises RuntimeError where one is out."""
        if self._visits:
            self._stream.follow(self._visits)
        self._found.clear()

    def take(self, parcel: int) -> Tensor:
        """As the stream's. A round ends where its first parcel comes again."""
        if self._visits and parcel not in self._known:  # the first round broke off
            self._visits = []
            self._found.clear()
        if not self._visits:
            self._seek(parcel)
        return self._stream.take(parcel)

    def _seek(self, parcel: int) -> None:
        if parcel in self._found:
            self._visits, self._known = self._planned(self._found), set(self._found)
            self._stream.follow(self._visits)
        else:
            self._found.append(parcel)
            self._stream.follow(self._planned([parcel]))

    def _planned(self, parcels: Sequence[int]) -> list[Visit]:
        return planned([Use(parcel, changes=False) for parcel in parcels], self._sizes, self._room)
