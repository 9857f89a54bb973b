"""A model, or what a run has made of one, written in the form that other programs take."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

import torch
from PIL import Image

from lowvram_db.config import Config, load
from lowvram_db.errors import UserError
from lowvram_db.formats.card import write_card
from lowvram_db.formats.inspect import inspect
from lowvram_db.formats.layout import EMA_PREFIX
from lowvram_db.formats.lora_file import BASE, base_of, read_lora
from lowvram_db.formats.merged import merged
from lowvram_db.formats.modelspec import Subject, describe
from lowvram_db.formats.stored import Model, open_stored, predicts, same
from lowvram_db.formats.written import check_place, dtypes_for, write_folder, write_single_file
from lowvram_db.progress import say
from lowvram_db.reading import AS_IT_IS, Reading
from lowvram_db.run import Run
from lowvram_db.sheet import read_grid

# As sd-scripts calls them.
_VERSIONS = {
    ("sd1", "epsilon"): "sd_v1",
    ("sd1", "v"): "sd_v1_v",
    ("sd2", "epsilon"): "sd_v2",
    ("sd2", "v"): "sd_v2_v",
    ("sdxl", "epsilon"): "sdxl_base_v1-0",
    ("sdxl", "v"): "sdxl_base_v1-0",
}


class Format(StrEnum):
    single_file = "single-file"
    diffusers = "diffusers"


def export(what: str, out: Path, form: Format, dtype: torch.dtype | None = None, reading: Reading = AS_IT_IS) -> None:
    """Write a model (its folder, file or hub id), or the model of a run's folder, to `out`.

    dtype: of UNet and text encoders; default: as they are. The VAE keeps its precision. Takes less than 1 GiB of memory
    for a model of any size. Raises UserError for what is no model, or where `out` exists or does not fit on its disk.
    """
    check_place(out, 0)
    if form is Format.single_file and out.suffix != ".safetensors":
        raise UserError(f"--out {out}: a single file's name ends in .safetensors")
    run = Run(Path(what).expanduser())
    with ExitStack() as stack:
        if run.config.is_file() and (run.model.is_dir() or run.lora.is_file()):
            if reading != AS_IT_IS:
                raise UserError(f"{what}: is a run, which knows how its model is read; leave those options out")
            config = load(run.config)
            model, subject = _trained(run, config, stack), subject_of(run, config)
        else:
            model, subject = stack.enter_context(open_stored(what, reading, form is Format.diffusers)), None
            if (wanted := reading.prediction_type) not in (None, said := predicts(model.folder)[0]):
                where = model.folder / "scheduler" / "scheduler_config.json"
                raise UserError(f"--prediction-type {wanted}: {where} says {said}; change it there")
            if reading.ema:  # they are the UNet now
                model = _without_averages(model)
        write(model, out, form, dtype, subject)
    if subject is not None and form is Format.diffusers:
        write_card(out, run, load(run.config))


def export_run(config: Config, run: Run, out: Path) -> None:
    """Write the finished model of a run as a single file."""
    with ExitStack() as stack:
        write(_trained(run, config, stack), out, Format.single_file, None, subject_of(run, config))


def write(model: Model, out: Path, form: Format, dtype: torch.dtype | None, subject: Subject | None) -> None:
    """Write an open model. dtype, and what is raised: as of export. subject: what it was taught."""
    dtypes = dtypes_for(model, dtype)
    if form is Format.diffusers:
        write_folder(out, model, dtypes)
        return
    stored = {part: dtypes[part] or next(iter(network.values())).dtype for part, network in model.parts.items()}
    write_single_file(out, model, dtypes, _described(model, out.stem, stored, model.metadata, subject))


def _described(
    model: Model, title: str, dtypes: dict[str, torch.dtype], before: Mapping[str, str], subject: Subject | None
) -> dict[str, str]:
    resolution = inspect(model.folder).resolution or 0
    return describe(model.family, predicts(model.folder)[0], resolution, title, dtypes, before, subject)


def describe_lora(
    base: Model, title: str, dtype: torch.dtype, base_name: str, subject: Subject | None
) -> dict[str, str]:
    """The metadata of a LoRA for a model, but for its hash and what follows from its tensors."""
    said = _described(base, title, {"unet": dtype}, {}, subject)
    said["modelspec.architecture"] += "/lora"
    return {
        **said,
        "ss_output_name": title,
        "ss_sd_model_name": Path(base_name).name,
        "ss_v2": str(base.family == "sd2"),
        "ss_base_model_version": _VERSIONS[base.family, said["modelspec.prediction_type"]],
        BASE: base_of(base),
    }


def _trained(run: Run, config: Config, stack: ExitStack) -> Model:
    """The finished model of a run: what was trained out of model/, the rest out of the base model, which may have it in
    a finer precision, and may have more than networks; or that with the run's LoRA in it."""
    if config.method.name == "lora":
        base = stack.enter_context(open_stored(config.model.name, config.model.reading, tokenizers=True))
        return _without_averages(merged(base, read_lora(run.lora, base, config.model.name)))
    finished = stack.enter_context(open_stored(str(run.model)))
    try:
        base = stack.enter_context(open_stored(config.model.name, config.model.reading))
    except UserError as error:
        say(f"{run.folder}: its base model is not there any more ({error}); all is taken out of {run.model}")
        return finished
    untrained = {part: base.parts[part] for part, own in finished.parts.items() if same(base.parts.get(part, {}), own)}
    if "vae" not in untrained:
        say(f"{config.model.name}: is not what {run.folder} was trained on any more; all is taken out of {run.model}")
        return finished
    whole = replace(finished, parts=finished.parts | untrained, metadata=base.metadata, others=base.others)
    return whole if "unet" in untrained else _without_averages(whole)


def _without_averages(model: Model) -> Model:
    """Averaged weights belong to one UNet, and are of no other."""
    return replace(model, others={key: one for key, one in model.others.items() if not key.startswith(EMA_PREFIX)})


def subject_of(run: Run, config: Config) -> Subject:
    """What a run has taught, for those who open what came of it."""
    prompt = config.fill(config.subject.plain_template)
    return Subject(prompt, _first_picture(run.sample_grid(config.train.steps)))


def _first_picture(sheet: Path) -> Image.Image | None:
    try:
        grid = read_grid(sheet)
    except UserError:  # the model is whole without it
        return None
    return None if grid is None else grid.rows[0][0]
