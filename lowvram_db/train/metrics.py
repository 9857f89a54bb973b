"""What happened in each step, for programs (metrics.jsonl) and for TensorBoard."""

import contextlib
import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from lowvram_db.atomic import replacing_file
from lowvram_db.progress import say


class Metrics:
    """One JSON object a step: {"step": n, name: value, ...}. A context manager.

    What cannot be written is said once and left out: no training ends for its log.

    Steps after `done` in an existing file are dropped: they belong to a run that was killed and are done again.
    """

    def __init__(self, path: Path, tensorboard: Path, done: int):
        self._logs: list[Any] = []
        self._open(_Lines, path, done)
        self._open(_TensorBoard, tensorboard, done)

    def _open(self, kind: Any, path: Path, done: int) -> None:
        try:
            self._logs.append(kind(path, done))
        except Exception as error:
            say(f"{path}: not written ({error})")

    def log(self, step: int, **values: float) -> None:
        """Write one step's values at once; they outlive a kill."""
        for log in list(self._logs):
            try:
                log.write(step, values)
            except Exception as error:
                self._logs.remove(log)
                say(f"{log.path}: not written any more, from step {step} on ({error})")

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for log in self._logs:
            with contextlib.suppress(OSError):
                log.close()


class _Lines:
    """metrics.jsonl."""

    def __init__(self, path: Path, done: int):
        self.path = path
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            with replacing_file(path) as temporary:
                temporary.write_text("".join(line for line in lines if _step(line) <= done), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, path: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter  # which fails where its package is broken

        self.path = path
        self._writer = SummaryWriter(str(path), purge_step=done + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def logged(path: Path, step: int) -> dict[str, float]:
    """What a metrics.jsonl says of a step, of all its lines together; nothing where there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {name: value for line in lines if _step(line) == step for name, value in json.loads(line).items()}


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off by a kill, or what a power cut left
