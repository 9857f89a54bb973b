"""The models of a run that can be judged: its base model and every checkpoint that is whole, or else what it made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lowvram_db.cache import model_digest
from lowvram_db.cache.catalogue import Catalogue
from lowvram_db.config import Config
from lowvram_db.errors import UserError
from lowvram_db.evaluate.pictures import Candidate
from lowvram_db.families import open_model
from lowvram_db.families.base import Family
from lowvram_db.progress import say
from lowvram_db.run import Run
from lowvram_db.train import checkpoint


def base_of(config: Config, catalogue: Catalogue) -> Candidate:
    """The model that a run began with."""
    family = open_model(config.model.name, config.model.revision, config.model.reading)
    return Candidate(0, config.model.name, model_digest(family, catalogue), family, {})


def candidates(config: Config, run: Run, base: Candidate, catalogue: Catalogue) -> list[Candidate]:
    """By step. What is damaged is said and left out. Raises UserError where nothing is left."""
    found = list(_checkpoints(run, base))
    if not found and run.model.is_dir():
        family = open_model(str(run.model))
        found = [Candidate(config.train.steps, run.model.name, model_digest(family, catalogue), family, {})]
    if not found:
        raise UserError(
            f"{run.folder}: has neither a whole checkpoint nor a model/ to evaluate; train it, with "
            "checkpoint.keep = 10 to have several to choose from"
        )
    return found


def _checkpoints(run: Run, base: Candidate) -> Iterator[Candidate]:
    for path in checkpoint.unreadable(run.checkpoints):
        say(f"{path}: damaged (state.json cannot be read); left out")
    for step, path in checkpoint.steps(run.checkpoints).items():
        try:
            yield _checkpoint(step, path, base)
        except UserError as error:
            say(f"{error}; left out")


def _checkpoint(step: int, path: Path, base: Candidate) -> Candidate:
    """Raises UserError for one that is damaged, or of another version of the program."""
    state = checkpoint.read_state(path)
    weights = {f"{part}.safetensors": part for part in _parts(base.family)}
    checksums = {file: checksum for file, checksum in state.checksums.items() if file in weights}
    if not checksums:
        raise UserError(f"{path}: holds no network's weights")
    checkpoint.check_files(path, replace(state, checksums=checksums))
    digest = hashlib.sha256(json.dumps([base.digest, checksums]).encode()).hexdigest()
    files = {weights[file]: path / file for file in checksums}
    return Candidate(step, f"checkpoints/{path.name}", digest, base.family, files)


def _parts(family: Family) -> list[str]:
    return [family.denoiser_part, "text_encoder", "text_encoder_2"]
