"""Progress for people: a live bar on a terminal, a plain line now and then elsewhere; both on stderr."""

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_PLAIN_LINE_EVERY = 15.0  # seconds


def say(message: str) -> None:
    """One line of news on stderr, above any live bar."""
    _console.print(message, markup=False, highlight=False, soft_wrap=True)


class Bar:
    """Counts work done; shows rate, time left and a note. A context manager."""

    def __init__(self, what: str, total: int, done: int = 0, unit: str = "it"):
        self._what, self._total, self._done, self._unit = what, total, done, unit
        self._first = done
        self._live: Progress | None = None

    def __enter__(self) -> "Bar":
        self._start = self._last_line = time.monotonic()
        if _console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._live = Progress(*columns, console=_console)
            self._task = self._live.add_task(self._what, total=self._total, completed=self._done, note="")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        elif kind is None and self._total:
            self._print_line("")

    @property
    def rate(self) -> float:
        """Units a second since the bar began."""
        return (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units; `note` stands behind the figures."""
        self._done += count
        if self._live:
            self._live.update(self._task, completed=self._done, note=self._figures(note))
        elif time.monotonic() - self._last_line > _PLAIN_LINE_EVERY:
            self._print_line(note)

    def _print_line(self, note: str) -> None:
        self._last_line = time.monotonic()
        say(f"{self._what} {self._done}/{self._total}  {self._figures(note)}")

    def _figures(self, note: str) -> str:
        rate = self.rate
        speed = f"{rate:.2f} {self._unit}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.2f} s/{self._unit}"
        left = timedelta(seconds=round((self._total - self._done) / rate)) if rate else "?"
        return "  ".join(filter(None, [speed, f"ETA {left}", note]))


_console = Console(stderr=True)
