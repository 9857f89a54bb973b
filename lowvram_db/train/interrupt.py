"""Ctrl-C (SIGTERM, a terminal that closes) as a wish that is granted between two steps; a second one ends at once."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_HANG_UP = {getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name)}  # POSIX and Windows
_REQUESTS = {signal.SIGINT, signal.SIGTERM} | _HANG_UP


@contextlib.contextmanager
def stop_on_request() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether a stop was asked for since.

    Signals that are ignored, as under nohup, or that others than Python handle stay so. Only the main thread may say
    what a signal does: in another one nothing is asked for.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        # A terminal that closes says so twice, by its shell and by the kernel: nobody has lost patience.
        if number in asked and number not in _HANG_UP:
            raise KeyboardInterrupt
        asked.append(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in _REQUESTS}
    before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
