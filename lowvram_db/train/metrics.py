"""What happened in each step, for programs (metrics.jsonl) and for TensorBoard."""

import json
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from lowvram_db.atomic import replacing_file


class Metrics:
    """One JSON object a step: {"step": n, name: value, ...}. A context manager.

    Steps after `done` in an existing file are dropped: they belong to a run that was killed and are done again.
    """

    def __init__(self, path: Path, tensorboard: Path, done: int):
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _step(line) <= done]
            with replacing_file(path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(tensorboard), purge_step=done + 1)

    def log(self, step: int, **values: float) -> None:
        """Write one step's values at once; they outlive a kill."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._tensorboard.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")  # cut off by a kill
