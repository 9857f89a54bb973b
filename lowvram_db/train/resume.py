"""From which checkpoint a run goes on, and whether it may: by what was trained on, not by where that lies."""

from collections import Counter
from pathlib import Path

from lowvram_db.atomic import free_name, rename
from lowvram_db.config import Config, differences
from lowvram_db.errors import UserError
from lowvram_db.progress import say
from lowvram_db.run import Run
from lowvram_db.train import checkpoint
from lowvram_db.train.checkpoint import OtherVersion, State

# Settings that do not change what has been trained so far; keys, or sections ending in a dot. What model and pictures
# are is told by their content.
MAY_CHANGE = ("train.steps", "sample.", "checkpoint.", "output.", "attention", "kernels",
              "train.gradient_checkpointing", "train.deterministic", "train.validate_every", "memory.",
              "prior.batch", "cache.dir", "model.", "subject.photos", "prior.images")  # fmt: skip


def choose(run: Run, resume: str) -> Path | None:
    """The checkpoint that `--resume auto|never|PATH` names. Raises UserError where work would be lost.

    One of the run's own that is damaged, as a power cut leaves it, is set aside in favour of the one before.
    """
    if resume == "auto":
        return _latest_readable(run)
    latest = checkpoint.latest(run.checkpoints)
    if resume == "never":
        if latest:
            raise UserError(
                f"{run.folder}: has {latest.name} already, which --resume never would overwrite; "
                "choose another output.name, or leave --resume out to go on with the same settings"
            )
        return None
    chosen = Path(resume)
    if not (chosen / "state.json").is_file():
        raise UserError(f"--resume {resume}: not a checkpoint folder (runs/NAME/checkpoints/step-NNNNNN)")
    if latest and latest.resolve() != chosen.resolve():
        raise UserError(
            f"--resume {resume}: {run.folder} already has {latest.name}, which would be overwritten; "
            "choose another output.name to branch off"
        )
    return chosen


def _latest_readable(run: Run) -> Path | None:
    for path in checkpoint.unreadable(run.checkpoints):
        _set_aside(path, UserError(f"{path}: damaged (state.json cannot be read)"))
    while (latest := checkpoint.latest(run.checkpoints)) is not None:
        try:
            checkpoint.read_state(latest)
            return latest
        except OtherVersion:
            raise
        except UserError as damage:
            _set_aside(latest, damage)
    return None


def whole(run: Run, start: Path | None) -> Path | None:
    """The checkpoint to start from, every byte of it as it was written: `start`, or the one before where `start` is the
    run's own and damaged. Raises UserError for one of another run."""
    while start is not None:
        try:
            checkpoint.check_files(start, checkpoint.read_state(start))
            return start
        except UserError as damage:
            if start.parent.resolve() != run.checkpoints.resolve():
                raise
            _set_aside(start, damage)
        start = _latest_readable(run)
    return None


def _set_aside(damaged: Path, damage: UserError) -> None:
    aside = free_name(damaged.with_name(f"damaged-{damaged.name}"))
    rename(damaged, aside)
    say(f"{damage}; it stands aside as {aside.name}, and training goes on from before it")


def check_settings(state: State, config: Config, start: Path) -> None:
    """Raise UserError naming the settings that differ from the checkpoint's and must not."""
    changed = differences(state.config, config)
    fixed = {key: values for key, values in changed.items() if not key.startswith(MAY_CHANGE)}
    if fixed:
        listed = ", ".join(f"{key} ({old!r} -> {new!r})" for key, (old, new) in fixed.items())
        allowed = ", ".join(key + "*" if key.endswith(".") else key for key in MAY_CHANGE)
        raise UserError(
            f"{start} was trained with other settings: {listed}. Change them back, or start a new run with "
            f"another output.name. These may change on resume: {allowed}"
        )
    if state.step > config.train.steps:
        raise UserError(f"train.steps: is {config.train.steps}, but {start} has been trained for {state.step} already")


def check_content(state: State, present: dict[str, list[str]], start: Path) -> None:
    """Raise UserError where model or pictures are not those that were trained on; of what is in `present`."""
    changed = [_change(what, state.content.get(what, []), now) for what, now in present.items()]
    if listed := ", ".join(filter(None, changed)):
        raise UserError(
            f"{start} was trained on other photos or another model than are there now: {listed}; "
            "bring them back, or start a new run with another output.name"
        )


def _change(what: str, before: list[str], now: list[str]) -> str:
    gone, new = Counter(before) - Counter(now), Counter(now) - Counter(before)
    if what == "model":
        return "another base model" if gone or new else ""
    counts = [f"{side.total()} {word}" for side, word in ((new, "new"), (gone, "gone or changed")) if side]
    return f"{what} ({', '.join(counts)})" if counts else ""
