"""The folder of one run: where everything is, and who may write to it."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import Timeout

from lowvram_db.atomic import remove_leftovers, replacing_file
from lowvram_db.config import Config
from lowvram_db.errors import UserError
from lowvram_db.lock import hold, hold_by_existence

_HEADER = "# The settings of this run as they were resolved, written by lowvram-db.\n"
_OWN = r"config\.toml|plan\.json|identifier\.json|metrics\.jsonl|report\.html|model"
_STEP = r"step-(\d{6,})"  # names of checkpoints


class Run:
    """runs/<name>/ and the names in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "config.toml"
        self.plan = folder / "plan.json"
        self.identifier = folder / "identifier.json"
        self.cache = folder / "cache"
        self.checkpoints = folder / "checkpoints"
        self.samples = folder / "samples"
        self.model = folder / "model"
        self.lora = folder / "lora.safetensors"  # of a run that trains one, in the place of model/
        self.metrics = folder / "metrics.jsonl"
        self.tensorboard = folder / "tensorboard"
        self.report = folder / "report.html"

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
            remove_leftovers(self.folder, rf"{_OWN}|lora\.safetensors|.*-\d{{6,}}\.safetensors")
            remove_leftovers(self.checkpoints, _STEP)
            remove_leftovers(self.samples, rf"{_STEP}\.png")
            yield
        finally:
            lock.release()

    def sample_grid(self, step: int) -> Path:
        return self.samples / f"step-{step:06d}.png"

    def sample_grids(self) -> list[Path]:
        """Those that are there, in the order of steps."""
        return [self.sample_grid(step) for step in _steps(self.samples, r"\.png")]

    def checkpoint_steps(self) -> list[int]:
        """By the names that are there."""
        return _steps(self.checkpoints)

    def single_file(self, step: int) -> Path:
        return self.folder / f"{self.folder.name}-{step:06d}.safetensors"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def save_config(self, config: Config) -> None:
        """Write down the resolved settings. Raises UserError where a file of the user's is called so."""
        if self.config.exists() and not _is_ours(self.config):
            raise UserError(f"{self.config}: is not of a run; move it elsewhere, or choose another output.name")
        with replacing_file(self.config) as temporary:
            temporary.write_text(_HEADER + config.to_toml(), encoding="utf-8")

    def save_identifier(self, told: dict[str, Any]) -> None:
        """Write down what the model made of the identifier."""
        with replacing_file(self.identifier) as temporary:
            temporary.write_text(json.dumps(told, indent=1), encoding="utf-8")


def _steps(folder: Path, suffix: str = "") -> list[int]:
    """Of what is called by its step in a folder; none where it is not there."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(_STEP + suffix, name)))


def _is_ours(config: Path) -> bool:
    """Whether we wrote this file, or a power cut has left nothing in it."""
    content = config.read_bytes()
    return content.startswith(_HEADER.strip().encode()) or not content.strip(b"\0")
