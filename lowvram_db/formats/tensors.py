"""The tensors of a model's file by their keys: described at once, read one by one, and none kept."""

from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from lowvram_db.errors import UserError
from lowvram_db.files.foreign import naming
from lowvram_db.files.pickled import unpickle
from lowvram_db.files.reader import Reader
from lowvram_db.files.stand_in import refuse_stand_in
from lowvram_db.files.writer import NAMES
from lowvram_db.formats.header import Described, Entry, Header, is_pickle

DAMAGED = "cannot be read; it is damaged, or was not downloaded to its end"


class Tensors(Described, Protocol):
    """An open file. A context manager, after which it is open no longer."""

    def __enter__(self) -> "Tensors": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __getitem__(self, key: str) -> Tensor:
        """Good until the next one is asked for: it may share its memory with the file."""


def tensors_of(path: Path) -> Tensors:
    """Of a .safetensors file, or of a pickle that runs no code. Raises UserError naming what is wrong with it."""
    return Pickled(path) if is_pickle(path) else Safe(path)


class Safe(Header):
    """A safetensors file."""

    def __enter__(self) -> "Safe":
        self._reader = Reader(self.path)
        with naming(self.path, DAMAGED):
            self._reader.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.__exit__(kind, error, trace)

    def __getitem__(self, key: str) -> Tensor:
        with naming(self.path, DAMAGED):
            return self._reader[key]


class Pickled:
    """A .ckpt, whose tensors may stand in a `state_dict` beside what its training has left there."""

    def __init__(self, path: Path):
        refuse_stand_in(path)
        with naming(path, DAMAGED):
            tree: Any = unpickle(path)
            tree = tree.get("state_dict", tree)
            self._tensors = {str(key): tensor for key, tensor in tree.items() if _is_plain(tensor)}
        if not self._tensors:
            raise UserError(f"{path}: has no tensor by a name")
        self.path, self.metadata = path, dict[str, str]()
        self.entries = {key: Entry(NAMES[t.dtype], tuple(t.shape)) for key, t in self._tensors.items()}

    def __enter__(self) -> "Pickled":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tensors = {}

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def numbers(self, key: str) -> list[float]:
        numbers: list[float] = self._tensors[key].flatten().tolist()
        return numbers


def _is_plain(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.dtype in NAMES
