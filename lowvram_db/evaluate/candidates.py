"""The models of a run that can be judged: its base model and every checkpoint that is whole, or else what it made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from lowvram_db.cache import model_digest
from lowvram_db.cache.catalogue import Catalogue
from lowvram_db.config import Config
from lowvram_db.errors import UserError
from lowvram_db.evaluate.pictures import Candidate
from lowvram_db.families import open_model
from lowvram_db.formats.merged import changes
from lowvram_db.methods import method_of
from lowvram_db.progress import say
from lowvram_db.run import Run
from lowvram_db.train import checkpoint, would_be
from lowvram_db.train.adapter import lora_of_weights


def base_of(config: Config, catalogue: Catalogue) -> Candidate:
    """The model that a run began with."""
    family = open_model(config.model.name, config.model.revision, config.model.reading)
    return Candidate(0, config.model.name, model_digest(family, catalogue), family)


def candidates(config: Config, run: Run, base: Candidate, catalogue: Catalogue) -> list[Candidate]:
    """By step. What is damaged is said and left out. Raises UserError where nothing is left."""
    found = list(_checkpoints(run, base)) or list(_finished(config, run, catalogue))
    if not found:
        raise UserError(
            f"{run.folder}: has neither a whole checkpoint nor a {method_of(config).place(run).name} to evaluate; "
            "train it, with checkpoint.keep = 10 to have several to choose from"
        )
    return found


def _finished(config: Config, run: Run, catalogue: Catalogue) -> Iterator[Candidate]:
    place = method_of(config).place(run)
    if not place.exists():
        return
    family = method_of(config).open(config, run)
    digest = model_digest(family, catalogue)
    if place.is_file():  # what is added to the model
        digest = _digest(digest, catalogue.file_digest(place))
    yield Candidate(config.train.steps, place.name, digest, family)


def _checkpoints(run: Run, base: Candidate) -> Iterator[Candidate]:
    for path in checkpoint.unreadable(run.checkpoints):
        say(f"{path}: damaged (state.json cannot be read); left out")
    for step, path in checkpoint.steps(run.checkpoints).items():
        try:
            yield _checkpoint(step, path, base)
        except UserError as error:
            say(f"{error}; left out")


def _checkpoint(step: int, path: Path, base: Candidate) -> Candidate:
    """What a run would have made of it. Raises UserError for one that is damaged, of another version of the program or
    of another model."""
    state = would_be.made_of(path)
    if state.content.get("model") != [base.digest]:
        raise UserError(f"{path}: was trained from another model than {base.path}")
    checkpoint.check_files(path, state)
    weights, method = would_be.Weights(path, state), state.config.method
    if method.init == "pissa":
        raise UserError(f"{path}: what its LoRA began with by PiSSA is not in it, only taken off the finished one")
    if method.name == "lora":
        family = base.family.with_added(changes(lora_of_weights(weights, method.scale)))
    else:
        family = base.family.with_tuned(weights)
    digest = _digest(base.digest, state.checksums)
    return Candidate(step, f"checkpoints/{path.name}", digest, family, state.content.get("photos"))


def _digest(*follows_from: object) -> str:
    return hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()
