"""What comes of a run by each method, where it lies in the run's folder, and how it is written and opened again."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from lowvram_db.atomic import creating_folder, replacing_file
from lowvram_db.config import Config
from lowvram_db.errors import UserError
from lowvram_db.families import open_model
from lowvram_db.families.base import Family
from lowvram_db.formats.export import describe_lora, subject_of
from lowvram_db.formats.lora_file import dtype_for, read_lora, write_lora
from lowvram_db.formats.merged import changes
from lowvram_db.formats.stored import open_stored
from lowvram_db.memory.device import DTYPES
from lowvram_db.run import Run
from lowvram_db.train.adapter import lora_of_networks
from lowvram_db.train.trainer import Trainer


class Method(NamedTuple):
    """write: what a trainer that has finished has made, to a path where nothing is. open: the model as it is then."""

    place: Callable[[Run], Path]
    write: Callable[[Trainer, Run], None]
    open: Callable[[Config, Run], Family]


def method_of(config: Config) -> Method:
    """The method that a run takes."""
    return _METHODS[config.method.name]


def _write_model(trainer: Trainer, run: Run) -> None:
    dtype = DTYPES[trainer.config.output.dtype]
    with creating_folder(run.model) as temporary:
        trainer.family.save(temporary, dtype, _written(trainer, run), **trainer.modules)


def _written(trainer: Trainer, run: Run) -> dict[str, Path]:
    """Files of the last step's checkpoint that hold what the finished model's would."""
    if trainer.average or trainer.config.weights != trainer.config.output.dtype:
        return {}
    whole = (
        part
        for part, network in trainer.modules.items()
        if all(f"{part}.{name}" in trainer.trained for name in network.state_dict())
    )
    return {part: run.checkpoint(trainer.step) / f"{part}.safetensors" for part in whole}


def _open_model(config: Config, run: Run) -> Family:
    return open_model(str(run.model))


def _write_lora(trainer: Trainer, run: Run) -> None:
    config, lora = trainer.config, lora_of_networks(trainer.modules)
    dtype = dtype_for(lora, DTYPES[config.output.dtype], run.lora.name)
    with ExitStack() as stack:
        base = stack.enter_context(open_stored(config.model.name, config.model.reading))
        metadata = describe_lora(base, run.folder.name, dtype, config.model.name, subject_of(run, config))
        with replacing_file(run.lora) as temporary:
            try:
                write_lora(temporary, base.family, lora, dtype, metadata)
            except ValueError as error:
                raise UserError(f"{run.lora}: {error}; in a new run (another output.name) lower train.lr") from error


def _open_lora(config: Config, run: Run) -> Family:
    model = config.model
    with open_stored(model.name, model.reading) as base:
        lora = read_lora(run.lora, base, model.name)
    return open_model(model.name, model.revision, model.reading).with_added(changes(lora))


_METHODS = {
    "full": Method(lambda run: run.model, _write_model, _open_model),
    "lora": Method(lambda run: run.lora, _write_lora, _open_lora),
}
