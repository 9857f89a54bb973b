"""Read the tensors of a safetensors file by name, and keep none of them."""

from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import safe_open
from torch import Tensor

_MOST = 64 * 2**20  # bytes of a file in memory


class Reader:
    """Tensors by name. A context manager, after which the file is no longer open or mapped.

    Raises OSError and SafetensorError for a file that cannot be read, or lacks a tensor that it is asked for.
    """

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> "Reader":
        self._open()
        self.names: list[str] = list(self._file.keys())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def __getitem__(self, name: str) -> Tensor:
        """Good until the next one is asked for: it shares its memory with the file."""
        if self._read > _MOST:  # what was read of a mapped file stays in memory until it is closed
            self._file.__exit__(None, None, None)
            self._open()
        tensor: Tensor = self._file.get_tensor(name)
        self._read += tensor.nbytes
        return tensor

    def _open(self) -> None:
        self._file: Any = safe_open(self._path, framework="pt").__enter__()
        self._read = 0
