"""What a run would have made, had it ended at a checkpoint: which of the checkpoint's files, and their weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from lowvram_db.errors import UserError
from lowvram_db.files.reader import Reader
from lowvram_db.train import checkpoint


def made_of(folder: Path) -> checkpoint.State:
    """The small part of a checkpoint, but of its files only those that the result would have been made of: the average
    instead of what is being trained, if there is one. Raises UserError as read_state does."""
    state = checkpoint.read_state(folder)
    averaged = checkpoint.AVERAGE in state.checksums
    wanted = {
        name: checksum
        for name, checksum in state.checksums.items()
        if name in (checkpoint.AVERAGE, checkpoint.FROZEN) or (name != checkpoint.OPTIMIZER and not averaged)
    }
    return replace(state, checksums=wanted)


class Weights(Mapping[str, Tensor]):
    """What these files hold, by the names of network and tensor: read when it is asked for, and not kept."""

    def __init__(self, folder: Path, state: checkpoint.State):
        """state: says which files. Raises UserError for one that cannot be read."""
        self._folder, self._places = folder, dict[str, tuple[str, str]]()
        for file in state.checksums:
            part = "" if file in (checkpoint.AVERAGE, checkpoint.FROZEN) else f"{file.removesuffix('.safetensors')}."
            with self._opened(file) as stored:
                self._places |= {part + name: (file, name) for name in stored.names}

    def __getitem__(self, name: str) -> Tensor:
        file, own_name = self._places[name]
        with self._opened(file) as stored:
            return stored[own_name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @contextmanager
    def _opened(self, file: str) -> Iterator[Reader]:
        try:
            with Reader(self._folder / file) as stored:
                yield stored
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._folder}: damaged ({error})") from error
