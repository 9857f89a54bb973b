"""What a run's folder tells, as plain values: of a run that is over, stopped, cut off, or of an older version.

Nothing here is believed: what is missing, damaged or odd leaves its part of the story out, and `lacking` says so.
"""

import json
import math
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lowvram_db import toml_text
from lowvram_db.config import flat
from lowvram_db.errors import UserError
from lowvram_db.photos import list_photos, load_photo
from lowvram_db.run import Run
from lowvram_db.sheet import Drawn, read_grid

Point = tuple[int, float]  # step, value

LARGEST_SIDE = 512  # pixels of a picture in a report, at most
_MOST_STEPS = 12  # of which pictures are shown
_MOST_PROMPTS = 12
_MOST_COLUMNS = 8  # guidance scales and seeds
_MOST_PHOTOS = 12


class Photo(NamedTuple):
    """One of the subject's photos, as training sees it: upright."""

    name: str
    width: int
    height: int
    small: Image.Image


class Phase(NamedTuple):
    """What a plan said of one phase, and what it came to; bytes, None where that is not known."""

    name: str
    predicted: float | None  # what PyTorch's allocator gives out on a GPU
    measured: float | None


class Token(NamedTuple):
    """A piece of the identifier, as a text encoder reads it."""

    text: str
    number: int
    rarity: float  # the share of the vocabulary that is more frequent
    near: list[str]  # words
    part: str  # the text encoder


@dataclass
class Story:
    """What is known of one run."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)  # by dotted key, as config.toml has them
    toml: str = ""
    metrics: dict[str, list[Point]] = field(default_factory=dict)  # by name, in the order of steps
    phases: list[Phase] = field(default_factory=list)  # of plan.json
    strategy: str = ""
    budget: float | None = None  # bytes
    identifier: str = ""  # what was said of it before training
    tokens: list[Token] = field(default_factory=list)  # that it is read as, of every text encoder
    pictures: dict[int, dict[Drawn, Image.Image]] = field(default_factory=dict)  # by step; of step 0 the base model's
    sheets: dict[int, Image.Image] = field(default_factory=dict)  # of versions that did not tell what is where
    photos: list[Photo] = field(default_factory=list)
    photo_count: int = 0
    evaluation: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[int] = field(default_factory=list)
    finished: bool = False  # whether there is a model
    lacking: list[str] = field(default_factory=list)

    def number(self, key: str) -> float | None:
        """A setting that has to be a number; None where it is none."""
        return finite(self.settings.get(key))

    def text(self, key: str) -> str:
        """A setting that has to be a text; empty where it is none."""
        value = self.settings.get(key)
        return value if isinstance(value, str) else ""

    @property
    def last_step(self) -> int:
        """The last one that is told of anywhere."""
        return max([0, *self.pictures, *self.sheets, *self.checkpoints, *(p[-1][0] for p in self.metrics.values())])


def tell(folder: Path) -> Story:
    """Raises UserError where the folder is none of a run."""
    run = Run(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run's, such as runs/NAME")
    if not any(part.exists() for part in (run.config, run.metrics, run.plan, run.samples)):
        raise UserError(f"{folder}: nothing of a run is in it; give a run's folder, such as runs/NAME")
    story = Story(folder.resolve().name)
    for part in (_settings, _metrics, _plan, _identifier, _pictures, _photos, _evaluation, _checkpoints):
        _try(part, story, run)
    return story


def finite(value: Any) -> float | None:
    """A number that is one, as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _try(part: Callable[[Story, Run], None], story: Story, run: Run) -> None:
    try:
        part(story, run)
    except UserError as problem:
        story.lacking.append(str(problem))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        story.lacking.append(f"{part.__name__.removeprefix('_')}: cannot be read ({error})")


def _settings(story: Story, run: Run) -> None:
    if not run.config.exists():
        story.lacking.append(f"{run.config.name} is not there: its settings are not known")
        return
    story.toml = toml_text.read(run.config)
    story.settings = flat(toml_text.parse(story.toml, run.config))


def _metrics(story: Story, run: Run) -> None:
    if not run.metrics.exists():
        story.lacking.append(f"{run.metrics.name} is not there: there are no curves")
        return
    by_step: dict[str, dict[int, float]] = {}
    unread = 0
    with run.metrics.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            read = _read_line(line)
            unread += read is None
            for name, value in (read or {}).items():
                if (number := finite(value)) is not None and name != "step":
                    by_step.setdefault(name, {})[int(read["step"])] = number  # type: ignore[index]
    story.metrics = {name: sorted(values.items()) for name, values in by_step.items()}
    if unread:
        story.lacking.append(f"{run.metrics.name}: {unread} of its lines cannot be read, and are left out")


def _read_line(line: str) -> dict[str, Any] | None:
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = read.get("step") if isinstance(read, dict) else None
    return read if isinstance(step, int) and 0 <= step < 2**31 else None


def _plan(story: Story, run: Run) -> None:
    plan = _json(run.plan)
    if plan:
        story.strategy, story.budget = str(plan["strategy"]["name"]), finite(plan["budget_bytes"])
        story.phases = [_phase(phase) for phase in plan["phases"]]


def _phase(phase: dict[str, Any]) -> Phase:
    peak, context = finite(phase["peak_bytes"]), finite(phase["components"]["context"])
    predicted = None if peak is None or context is None else peak - context
    return Phase(str(phase["name"]), predicted, finite(phase.get("measured_bytes")))


def _evaluation(story: Story, run: Run) -> None:
    story.evaluation = _json(run.folder / "evaluation.json")


def _identifier(story: Story, run: Run) -> None:
    told = _json(run.identifier)
    if told:
        story.tokens = [_token(piece, one["part"]) for one in told["encoders"] for piece in one["pieces"]]
        story.identifier = str(told["said"])


def _token(piece: dict[str, Any], part: Any) -> Token:
    near = [str(word) for word in piece["near"]]
    return Token(str(piece["text"]), int(piece["number"]), float(piece["rarity"]), near, str(part))


def _json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file. Raises UserError for what is no object in JSON."""
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name}: cannot be read ({error})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path.name}: is not what is written there")
    return tree


def _pictures(story: Story, run: Run) -> None:
    sheets = {int(path.stem.removeprefix("step-")): path for path in run.sample_grids()}
    for step in _spread(sorted(sheets), _MOST_STEPS):
        try:
            _picture(story, step, sheets[step])
        except UserError as problem:
            story.lacking.append(str(problem))


def _picture(story: Story, step: int, path: Path) -> None:
    grid = read_grid(path)
    if grid is None:
        with Image.open(path) as opened:
            story.sheets[step] = _small(opened.convert("RGB"), 3 * LARGEST_SIDE)
        return
    columns = _MOST_COLUMNS // grid.seeds or 1
    shown: tuple[Container[Any], ...] = (
        {*grid.prompts[:_MOST_PROMPTS]},
        {*grid.guidance[:columns]},
        range(_MOST_COLUMNS),
    )
    story.pictures[step] = {
        drawn: _small(picture, LARGEST_SIDE)
        for drawn, picture in grid.pictures.items()
        if all(part in allowed for part, allowed in zip(drawn, shown, strict=True))
    }


def _photos(story: Story, run: Run) -> None:
    named = story.text("subject.photos")
    if not named:
        return
    folder = Path(named).expanduser()
    if not folder.is_dir():
        story.lacking.append(f"subject.photos: {named} is not there, as seen from the folder that this was made in")
        return
    paths = list_photos(folder)
    story.photo_count = len(paths)
    for path in paths[:_MOST_PHOTOS]:
        try:
            photo = load_photo(path)
        except UserError as problem:
            story.lacking.append(str(problem))
        else:
            story.photos.append(Photo(path.name, *photo.size, _small(photo, LARGEST_SIDE)))


def _checkpoints(story: Story, run: Run) -> None:
    story.finished = run.model.is_dir() or run.lora.is_file()
    story.checkpoints = run.checkpoint_steps()
    if not story.checkpoints:
        story.lacking.append("there is no checkpoint: training cannot go on from here")


def _small(picture: Image.Image, side: int) -> Image.Image:
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _spread(steps: list[int], most: int) -> list[int]:
    """At most so many of them, evenly, with the first and the last."""
    if len(steps) <= most:
        return steps
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]
