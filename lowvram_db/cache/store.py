"""Entries on disk: one safetensors file a key, whole or absent."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowvram_db.atomic import remove_leftovers, replacing_file


class Store:
    """A folder of named tensors by key (a hex digest)."""

    def __init__(self, folder: Path):
        self._folder = folder
        if folder.is_dir():
            remove_leftovers(folder)

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors stored under `key`; None where there are none or the file is damaged."""
        try:
            return load_file(self._path(key))
        except (FileNotFoundError, SafetensorError):
            return None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Store tensors under `key`. Raises UserError when the disk is full or read-only."""
        with replacing_file(self._path(key)) as temporary:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"
