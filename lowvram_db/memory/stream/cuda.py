"""Lanes of a GPU: two streams for the copies, events between them and the computation's stream, pinned memory.

Nothing in a step waits for the device. Once there are stages, each lane is served by a thread: "fill" and "drain" copy
in RAM, and a copy that waits for them is asked for when they are done; the host then waits, at most, for that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from lowvram_db.memory.size import gib
from lowvram_db.memory.stream.lanes import Lane, Wait

_PAGE = 4096

# Done when the copy has been asked for, with the GPU's event that it is over; None where it is over by then.
Event = Future[torch.cuda.Event | None]


class Cuda:
    """device: with its number."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {lane: torch.cuda.Stream(device) for lane in ("up", "down")}
        self._threads: dict[Lane, ThreadPoolExecutor] = {}
        self._registered: list[Tensor] = []
        # Also where nobody closes it: pages that go back to the system while they are registered are, to the driver,
        # still those of before, and whoever gets their addresses next has other bytes copied than it reads.
        self._unregister = weakref.finalize(self, _unregister, self._registered, list(self._streams.values()))
        self._unregister.atexit = False  # the process's end does it all

    def room(self, size: int) -> Tensor:
        room = torch.empty(size, dtype=torch.uint8, device=self._device)
        # The allocator may have taken the memory from work that is still to be done, and will give it to other work.
        for stream in self._streams.values():
            stream.wait_stream(torch.cuda.current_stream(self._device))
            room.record_stream(stream)
        return room

    def home(self, size: int, pinned: bool) -> Tensor:
        return self._pinned(size) if pinned else torch.zeros(size, dtype=torch.uint8)

    def stage(self, size: int) -> Tensor:
        lanes: tuple[Lane, ...] = "fill", "up", "down", "drain"
        self._threads = self._threads or {lane: ThreadPoolExecutor(1, lane) for lane in lanes}
        return self._pinned(size)

    def copy(self, lane: Lane, destination: Tensor, source: Tensor, waits: Sequence[Wait]) -> Event:
        events = [wait.event for wait in waits]
        if lane in self._streams:
            return self._serve(lane, lambda: self._cross(self._streams[lane], destination, source, events))
        return self._serve(lane, lambda: _move(destination, source, events))

    def lend(self, place: Tensor, waits: Sequence[Wait]) -> Tensor:
        stream = torch.cuda.current_stream(self._device)
        for wait in waits:
            _wait_in(stream, wait.event)
        return place

    def take_back(self, place: Tensor, lent: Tensor, changed: bool) -> Event:
        return _done(torch.cuda.current_stream(self._device).record_event())

    def drop(self, place: Tensor, arrived: Wait) -> Event:
        event: Event = arrived.event
        return event

    def settle(self, waits: Sequence[Wait]) -> None:
        for wait in waits:
            _wait_here(wait.event)

    def close(self) -> None:
        for thread in self._threads.values():
            thread.shutdown()
        self._unregister()

    def _pinned(self, size: int) -> Tensor:
        """Zeros. Registered: what torch pins by itself it rounds up to a power of two."""
        if not size:
            return torch.zeros(0, dtype=torch.uint8)
        whole = torch.zeros(size + _PAGE, dtype=torch.uint8)
        memory = whole[-whole.data_ptr() % _PAGE :][:size]
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))
        if code != 0:
            with suppress(RuntimeError):  # CUDA tells the next kernel of it too, which has nothing to do with it
                torch.ones(1, device=self._device)
            raise MemoryError(f"{gib(size)} of RAM cannot be pinned (CUDA error {code})")
        self._registered.append(memory)
        return memory

    def _serve(self, lane: Lane, work: Callable[[], torch.cuda.Event | None]) -> Event:
        if self._threads:
            return self._threads[lane].submit(work)
        return _done(work())

    def _cross(self, stream: torch.cuda.Stream, to: Tensor, source: Tensor, events: list[Event]) -> torch.cuda.Event:
        for event in events:
            _wait_in(stream, event)
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
        return stream.record_event()


def _move(destination: Tensor, source: Tensor, events: list[Event]) -> None:
    for event in events:
        _wait_here(event)
    destination.copy_(source)


def _wait_in(stream: torch.cuda.Stream, event: Event) -> None:
    """Raises what has kept the copy from being asked for."""
    if (over := event.result()) is not None:
        stream.wait_event(over)


def _wait_here(event: Event) -> None:
    if (over := event.result()) is not None:
        over.synchronize()


def _done(event: torch.cuda.Event | None) -> Event:
    future: Event = Future()
    future.set_result(event)
    return future


def _unregister(registered: list[Tensor], streams: list[torch.cuda.Stream]) -> None:
    for stream in streams:
        stream.synchronize()
    for memory in registered:  # each of which is there until it is pinned no more
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
    registered.clear()
