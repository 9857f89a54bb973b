"""A run, judged: draw, let the denoiser go, look at the pictures, and say which step to keep."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from lowvram_db.atomic import replacing_file
from lowvram_db.cache import catalogue_of, model_digest
from lowvram_db.cache.catalogue import Catalogue
from lowvram_db.concept import subject_photos
from lowvram_db.config import Config, load
from lowvram_db.encoding import cache_folder
from lowvram_db.errors import DiskRefuses, UserError
from lowvram_db.evaluate import recommend, scores
from lowvram_db.evaluate.backbones import Found, find
from lowvram_db.evaluate.candidates import base_of, candidates
from lowvram_db.evaluate.networks import Backbone
from lowvram_db.evaluate.pictures import Candidate, How, Wanted
from lowvram_db.evaluate.pictures import load as load_pictures
from lowvram_db.evaluate.prompts import read_prompts
from lowvram_db.evaluate.scores import MOST_SEEDS, Drawn, Photos, Scores
from lowvram_db.families import open_model
from lowvram_db.framing import View
from lowvram_db.memory.device import pick_device, release_memory
from lowvram_db.photos import load_photo
from lowvram_db.progress import Bar, say
from lowvram_db.report import write_report
from lowvram_db.run import Run

_FORMAT = 1
_PLAIN = 6  # pictures of the class prompt a seed
_DEMO_BASE = Path(__file__).parents[1] / "demo" / "base"


def evaluate(
    folder: Path, prompts: Path | None = None, backbone: str = "auto", seeds: int = 4, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Judge every checkpoint of a run, write evaluation.json and evaluation.csv into its folder, and return the former.

    What was judged before in the same way is only read. prompts: a file of templates; default: the backbone's own.
    overrides: of the run's settings, as `subject.photos=...` where they have moved. Raises UserError for what is no run
    or has nothing to judge, and for a backbone that is not there.
    """
    run, plan = planned(folder, prompts, backbone, seeds, overrides)
    return _known(run, plan.key) or _judged(run, plan)


@dataclass(frozen=True)
class _Photos:
    """The subject's photos, cut as training cuts them; those held back apart."""

    trained: list[Image.Image]
    held_out: list[Image.Image]
    digests: list[str]


@dataclass(frozen=True)
class Plan:
    """All that an evaluation follows from."""

    base: Candidate
    candidates: list[Candidate]
    backbone: Found
    photos: _Photos
    subject: list[str]  # prompts, filled in
    without: list[str]  # the same without the identifier, which no backbone knows
    plain: str  # the class prompt
    seeds: int
    how: How
    key: str

    @property
    def settings(self) -> dict[str, Any]:
        """For people."""
        settings = {"prompts": self.subject, "class_prompt": self.plain, "seeds": self.seeds}
        return {**settings, **{name: value for name, value in asdict(self.how).items() if name != "compute"}}

    @property
    def wanted(self) -> list[list[list[Wanted]]]:
        """Of the subject's prompts and of the class prompt, rows by seed."""
        subject = [[Wanted(prompt, seed) for seed in range(self.seeds)] for prompt in self.subject]
        plain = [[Wanted(self.plain, row * self.seeds + seed) for seed in range(self.seeds)] for row in range(_PLAIN)]
        return [subject, plain]


def planned(
    folder: Path, prompts: Path | None = None, backbone: str = "auto", seeds: int = 4, overrides: Sequence[str] = ()
) -> tuple[Run, Plan]:
    """The run, and what evaluate does with it; as there."""
    run = Run(folder)
    if not run.config.is_file():
        raise UserError(f"{folder}: is not the folder of a run, which has a config.toml in it")
    if not 1 <= seeds <= MOST_SEEDS:
        raise UserError(f"--seeds {seeds}: from 1 to {MOST_SEEDS}")
    own = read_prompts(prompts) if prompts else None
    config = load(run.config, list(overrides))
    catalogue = catalogue_of(cache_folder(config, run))
    try:
        return run, _plan(config, run, own, backbone, seeds, catalogue)
    finally:
        catalogue.save()


def _plan(config: Config, run: Run, own: list[str] | None, backbone: str, seeds: int, catalogue: Catalogue) -> Plan:
    base = base_of(config, catalogue)
    judged = candidates(config, run, base, catalogue)
    found = find(backbone, base.digest == model_digest(open_model(str(_DEMO_BASE)), catalogue))
    photos = _photos(config, judged, catalogue)
    templates = own or found.prompts(config.subject.class_noun, photos.trained)
    subject, plain = [config.fill(template) for template in templates], config.fill(config.prior.prompt)
    base.family.check_prompts([*subject, plain])
    sample = config.sample
    how = How(sample.guidance[0], sample.steps, config.train.resolution, config.precision.compute)
    files = [catalogue.file_digest(file) for file in found.files]
    models = [base.digest, *((model.step, model.path, model.digest) for model in judged)]
    follows_from = [_FORMAT, models, found.name, files, photos.digests, len(photos.held_out)]
    follows_from += [subject, plain, seeds, _PLAIN, asdict(how)]
    key = hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()
    without = [" ".join(_without(template, config).split()) for template in templates]
    return Plan(base, judged, found, photos, subject, without, plain, seeds, how, key)


def _without(template: str, config: Config) -> str:
    return template.format_map({"identifier": "", "class": config.subject.class_noun})


def _photos(config: Config, judged: list[Candidate], catalogue: Catalogue) -> _Photos:
    """In the order in which training chose what to hold back. Raises UserError where there are none."""
    if not Path(config.subject.photos).expanduser().is_dir():
        raise UserError(
            f"subject.photos: {config.subject.photos} is not there, as seen from this folder; say where the photos are "
            "by --set subject.photos=FOLDER"
        )
    paths = subject_photos(config, catalogue.is_good)
    digests = {path: catalogue.look(path).digest for path in paths}
    paths.sort(key=digests.__getitem__)
    last = judged[-1]
    if last.photos is not None and last.photos != sorted(digests.values()):
        say(f"{config.subject.photos}: these are not the photos that {last.path} was trained on")
    side, kept_back = config.train.resolution, config.train.hold_out
    cut = [_cut(load_photo(path), side) for path in paths]
    return _Photos(cut[kept_back:], cut[:kept_back], [digests[path] for path in paths])


def _cut(photo: Image.Image, side: int) -> Image.Image:
    return Image.fromarray(View.of(photo.size, (side, side)).pixels(photo).permute(1, 2, 0).numpy())


def _known(run: Run, key: str) -> dict[str, Any] | None:
    """What was found before."""
    try:
        known = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
        return known if known["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _judged(run: Run, plan: Plan) -> dict[str, Any]:
    device, models = pick_device(), [plan.base, *plan.candidates]
    wanted = [one for part in plan.wanted for row in part for one in row]
    with _picture_folder(run) as folder:
        drawing = []
        with Bar("drawing", total=len(wanted) * len(models), unit="picture") as bar:
            for model in models:
                try:
                    model.pictures(wanted, plan.how, folder, device, bar)
                    drawing.append(model)
                except DiskRefuses:  # the next one's pictures, too
                    raise
                except UserError as error:
                    if model is plan.base:
                        raise
                    say(f"{model.path}: {error}; left out")
        if len(drawing) == 1:
            raise UserError(f"{run.folder}: no checkpoint of it draws pictures")
        # Only now: it never shares the device with a denoiser.
        judge = plan.backbone.load(device)
        photos = _seen_photos(judge, plan.photos)
        base, *drawn = [_seen(judge, model, plan, folder) for model in drawing]
        del judge
        release_memory()
    return _written(run, _result(plan, drawing[1:], base, drawn, photos))


@contextlib.contextmanager
def _picture_folder(run: Run) -> Iterator[Path]:
    """In the run; where that cannot be written, one for the moment."""
    folder = run.folder / "evaluation"
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        say(f"{folder}: cannot be written ({error.strerror}); its pictures are not kept")
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
    else:
        yield folder


def _seen_photos(judge: Backbone, photos: _Photos) -> Photos:
    references, others = (photos.held_out, photos.trained) if photos.held_out else (photos.trained, [])
    embedded = judge.embed(references)
    apart = judge.embed(others) if others else embedded[:0]
    return Photos.of(embedded, apart, judge.appearance(photos.trained))


def _seen(judge: Backbone, model: Candidate, plan: Plan, folder: Path) -> Drawn:
    def look(rows: list[list[Wanted]], by: Callable[[list[Image.Image]], Tensor]) -> Tensor:
        pictures = load_pictures([model.picture(one, plan.how, folder) for row in rows for one in row])
        return by(pictures).unflatten(0, (len(rows), plan.seeds))

    subject, plain = plan.wanted
    asked = [prompt for prompt in plan.without for _ in range(plan.seeds)]
    return Drawn(
        subject=look(subject, judge.embed),
        appearance=look(subject, judge.appearance),
        agreement=look(subject, lambda all_: judge.agreement(all_, asked)) if judge.reads_prompts else None,
        plain=look(plain, judge.embed),
    )


def _result(plan: Plan, models: list[Candidate], base: Drawn, drawn: list[Drawn], photos: Photos) -> dict[str, Any]:
    before = scores.scores(base, base, photos)
    after = {model.step: scores.scores(one, base, photos) for model, one in zip(models, drawn, strict=True)}
    gained = {step: recommend.gains(own, before, photos.similarity) for step, own in after.items()}
    found = {step: recommend.findings(after[step], gained[step]) for step in after}
    choice = recommend.recommend(gained, found)
    paths = {model.step: model.path for model in models}
    return {
        "format": _FORMAT,
        "key": plan.key,
        "backbone": plan.backbone.name,
        "compared_with": "held-out photos" if plan.photos.held_out else "photos",
        "photos": len(photos.references),
        "photos_similarity": photos.similarity,
        "settings": plan.settings,
        "base": _intervals(before),
        "checkpoints": [
            {"step": step, "path": paths[step], "scores": _intervals(own), "findings": found[step]}
            for step, own in after.items()
        ],
        "recommended": {"step": choice.step, "path": paths[choice.step], "reason": choice.reason},
    }


def _intervals(own: Scores) -> dict[str, Any]:
    return {name: scores.interval(values) for name, values in own.items()}


def _written(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """The result, in the run's folder too, and on its page; where that cannot be written it is said."""
    rows = [(0, result["base"]), *((one["step"], one["scores"]) for one in result["checkpoints"])]
    figures = ("mean", "low", "high")
    try:
        with replacing_file(run.folder / "evaluation.csv") as temporary, temporary.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["step", "score", *figures, "backbone"])
            for step, own in rows:
                for name, value in own.items():
                    known = [value and value[figure] for figure in figures]
                    table.writerow([step, name, *known, result["backbone"]])
        with replacing_file(run.folder / "evaluation.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
        write_report(run.folder)
    except (OSError, UserError) as error:
        say(f"{run.folder}: not all of the evaluation is written ({error})")
    return result
