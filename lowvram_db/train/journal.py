"""What each step came to, written down once its numbers have come from the device."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from types import TracebackType

from lowvram_db.memory.device import peak_bytes
from lowvram_db.progress import Bar
from lowvram_db.train.metrics import Metrics
from lowvram_db.train.outcome import Outcome
from lowvram_db.train.trainer import Trainer


class Journal:
    """Writes down every step, once its numbers have come from the device. A context manager."""

    def __init__(self, trainer: Trainer, metrics: Metrics, bar: Bar):
        self._trainer, self._metrics, self._bar = trainer, metrics, bar
        self._unread: deque[tuple[int, float, Outcome]] = deque()
        self._settled = self._lr = 0.0

    def begin(self) -> None:
        """A step begins. What lies between steps that are settled, as saving does, counts for none of them."""
        self._lr = self._trainer.learning_rate(self._trainer.config.train.lr)
        if not self._unread:
            self._settled = time.perf_counter()

    def note(self, outcome: Outcome) -> None:
        """Of the step that was begun last."""
        self._unread.append((self._trainer.step, self._lr, outcome))

    def settle(self, lag: int = 0) -> None:
        """Read and write all but the last `lag` steps. Raises UserError as Trainer.judge does."""
        while len(self._unread) > lag:
            step, lr, outcome = self._unread.popleft()
            numbers = outcome.read()
            self._trainer.judge(step, numbers)
            before, self._settled = self._settled, time.perf_counter()
            peak = peak_bytes(self._trainer.device)
            self._metrics.log(
                step,
                loss=numbers.total,
                instance_loss=numbers.instance,
                prior_loss=numbers.prior,
                lr=lr,
                seconds=self._settled - before,
                peak_bytes=peak,
            )
            self._bar.advance(note=f"loss {numbers.total:.4f}  peak {peak / 2**30:.2f} GiB")

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(Exception):  # where one is leaving already
            self.settle()
