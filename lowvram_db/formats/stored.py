"""A model on disk as networks whose tensors are read one by one, be it a folder or a single file."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowvram_db.errors import UserError
from lowvram_db.files.foreign import read_json
from lowvram_db.files.writer import DTYPES
from lowvram_db.formats.content import check_numbers
from lowvram_db.formats.forms import to_network
from lowvram_db.formats.inspect import inspect
from lowvram_db.formats.layout import LAYOUTS
from lowvram_db.formats.names import CLIP_COUNT, Form, Place, in_network, name_now
from lowvram_db.formats.single_file import as_configs, as_folder, opened
from lowvram_db.formats.source import find_model
from lowvram_db.formats.tensors import Tensors, tensors_of
from lowvram_db.formats.weight_files import weight_files
from lowvram_db.reading import AS_IT_IS, Reading


class Readable(Protocol):
    """One tensor of a network, of which only the dtype and shape are known before it is read."""

    @property
    def dtype(self) -> torch.dtype:
        """What it is written in, where nothing else is asked for."""

    @property
    def read_as(self) -> torch.dtype:
        """What read() gives."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In the network."""

    def read(self) -> Tensor:
        """Good until the next one is read."""


class Stored(NamedTuple):
    """One tensor of a network, where it lies."""

    file: Tensors
    key: str
    form: Form = Form.same

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.file.entries[self.key].dtype]

    @property
    def read_as(self) -> torch.dtype:
        return self.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """In the network."""
        return in_network(self.file.entries[self.key].shape, self.form)

    def read(self) -> Tensor:
        """Good until the next one of the file is read."""
        return to_network(self.file[self.key], self.form)


Network = Mapping[str, Readable]  # by diffusers' names, those of text encoders with their prefix


@dataclass
class Model:
    """An open model."""

    folder: Path  # its config files and tokenizers, in diffusers' format
    family: str
    parts: dict[str, Network]
    metadata: dict[str, str] = field(default_factory=dict)  # of a single file
    others: dict[str, Stored] = field(default_factory=dict)  # what a single file has beside its networks, by its keys


@contextmanager
def open_stored(name: str, reading: Reading = AS_IT_IS, tokenizers: bool = False) -> Iterator[Model]:
    """A model by its folder, file or hub id. Raises UserError for one that is none, or of another family.

    tokenizers: whether the folder of a single file is to have them; they may have to be looked for.
    """
    place = Path(name).expanduser()
    if place.is_file():
        with opened(place, reading) as model:
            parts: dict[str, Network] = {
                part: {name: Stored(file, *place) for name, place in places.items()}
                for part, (file, places) in model.parts.items()
            }
            others = {key: Stored(model.file, key) for key in model.others}
            folder = as_folder(place, reading) if tokenizers else as_configs(place, reading)
            yield Model(folder, model.family, parts, model.file.metadata, others)
        return
    folder = find_model(name, reading=reading)
    report = inspect(folder)
    if report.family is None or report.problem:
        raise UserError(f"{folder}: {report.kind} is not supported: {report.problem}")
    with ExitStack() as stack:
        parts = {part: _network(folder, part, stack) for part in LAYOUTS[report.family]}
        yield Model(folder, report.family, parts)


def _network(folder: Path, part: str, stack: ExitStack) -> Network:
    network: dict[str, Readable] = {}
    for path in weight_files(folder, part):
        file = stack.enter_context(tensors_of(path))
        names = {name_now(part, name): name for name in file.entries if not name.endswith(CLIP_COUNT)}
        check_numbers(file, {full: Place(name) for full, name in names.items()})
        network |= {full: Stored(file, name) for full, name in names.items()}
    return network


def predicts(folder: Path) -> tuple[str, bool]:
    """What the UNet predicts, and whether the noise schedule ends in noise alone, by the folder's scheduler."""
    path = folder / "scheduler" / "scheduler_config.json"
    settings = read_json(path, "the noise schedule and prediction type stand in it")
    return str(settings.get("prediction_type", "epsilon")), settings.get("rescale_betas_zero_snr") is True


def same(one: Network, other: Network) -> bool:
    """Whether two networks are the same in the precision of the coarser one, tensor by tensor."""
    if one.keys() != other.keys() or any(stored.shape != other[name].shape for name, stored in one.items()):
        return False
    return all(torch.equal(stored.read().to(other[name].dtype), other[name].read()) for name, stored in one.items())
