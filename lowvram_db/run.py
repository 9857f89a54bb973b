"""The folder of one run: where everything is, who may write to it, and whether it fits the config at hand."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout

from lowvram_db.atomic import remove_leftovers
from lowvram_db.config import Config, differences
from lowvram_db.errors import UserError
from lowvram_db.lock import hold, hold_by_existence

# Settings that do not change what has been trained so far; keys, or sections ending in a dot.
MAY_CHANGE = ("train.steps", "sample.", "checkpoint.", "output.", "attention", "kernels",
              "train.gradient_checkpointing", "memory.", "prior.batch", "cache.dir")  # fmt: skip


class Run:
    """runs/<name>/ and the names in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "config.toml"
        self.plan = folder / "plan.json"
        self.cache = folder / "cache"
        self.class_images = folder / "class_images"
        self.checkpoints = folder / "checkpoints"
        self.samples = folder / "samples"
        self.model = folder / "model"
        self.metrics = folder / "metrics.jsonl"
        self.tensorboard = folder / "tensorboard"

    @classmethod
    def of(cls, config: Config) -> "Run":
        return cls(Path(config.output.dir).expanduser() / config.output.name)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one process. Raises UserError where another one has it or it cannot be made."""
        in_use = self.folder / ".in-use"  # instead of a lock, where the file system offers none
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = hold(self.folder / ".lock") or hold_by_existence(in_use)
        except Timeout as error:
            stale = f"; if none is, a killed one has left {in_use} behind: delete it" if in_use.exists() else ""
            raise UserError(
                f"{self.folder}: another process is training there; choose another output.name{stale}"
            ) from error
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be used as a folder ({error}); change output.dir") from error
        try:
            for place in (self.folder, self.checkpoints, self.samples):
                remove_leftovers(place)
            yield
        finally:
            lock.release()

    def sample_grid(self, step: int) -> Path:
        return self.samples / f"step-{step:06d}.png"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def latest_checkpoint(self) -> Path | None:
        return max(self.checkpoints.glob("step-*"), default=None, key=lambda path: path.name)

    def choose_checkpoint(self, resume: str) -> Path | None:
        """The checkpoint that `--resume auto|never|PATH` names. Raises UserError where work would be lost."""
        latest = self.latest_checkpoint()
        if resume == "auto":
            return latest
        if resume == "never":
            if latest:
                raise UserError(
                    f"{self.folder}: has {latest.name} already, which --resume never would overwrite; "
                    "choose another output.name, or --resume auto to go on"
                )
            return None
        chosen = Path(resume)
        if not (chosen / "state.json").is_file():
            raise UserError(f"--resume {resume}: not a checkpoint folder (runs/NAME/checkpoints/step-NNNNNN)")
        if latest and latest.resolve() != chosen.resolve():
            raise UserError(
                f"--resume {resume}: {self.folder} already has {latest.name}, which would be overwritten; "
                "choose another output.name to branch off"
            )
        return chosen


def check_resumable(saved: Config, config: Config, checkpoint: Path) -> None:
    """Raise UserError naming the settings that differ from the checkpoint's and must not."""
    changed = differences(saved, config)
    fixed = {key: values for key, values in changed.items() if not key.startswith(MAY_CHANGE)}
    if fixed:
        listed = ", ".join(f"{key} ({old!r} -> {new!r})" for key, (old, new) in fixed.items())
        allowed = ", ".join(key + "*" if key.endswith(".") else key for key in MAY_CHANGE)
        raise UserError(
            f"{checkpoint} was trained with other settings: {listed}. Change them back, or start a new run with "
            f"another output.name. These may change on resume: {allowed}"
        )
