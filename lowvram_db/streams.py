"""Standard output and error that bear anything: what cannot be said any more ends no work."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

_NAMES = ("stdout", "stderr")


class _Patient:
    """A text stream for which it is no error that nobody listens: a closed pipe, a terminal that is gone."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: it has been closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def patient_streams() -> Iterator[None]:
    """Inside, nothing that is printed can fail: characters that the encoding lacks are escaped, the rest is lost."""
    _occupy_closed_handles()
    before = {name: getattr(sys, name) for name in _NAMES}
    for name, stream in before.items():
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            stream.reconfigure(errors="backslashreplace")
        # None: closed before we began, or a Windows program without a console
        setattr(sys, name, _Patient(io.StringIO() if stream is None else stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream if stream and _flushed(stream) else None)  # else Python's end finds fault with it


def _occupy_closed_handles() -> None:
    """Else the next file that is opened becomes standard output, and libraries write their messages into it."""
    handle = os.open(os.devnull, os.O_RDWR)
    while handle <= 2:
        handle = os.open(os.devnull, os.O_RDWR)
    os.close(handle)


def _flushed(stream: Any) -> bool:
    try:
        stream.flush()
    except (OSError, ValueError):
        return False
    return True
