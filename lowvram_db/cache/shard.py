"""One file of entries: safetensors, written once, self-describing, every byte of it covered by a checksum.

The file is named by the SHA-256 of its header; the header holds the SHA-256 of every entry, and the entries are all the
rest. So a shard needs nothing beside itself to be checked, and one damaged entry says nothing about the others.

safetensors' own reader copies tensor by tensor and keeps all it touched in memory; a training step wants a batch out of
thousands of entries in a few microseconds a row, and memory that does not grow. So this reads by itself, from a map of
the file, whose pages it lets go of as soon as they are copied.
"""

import hashlib
import json
import math
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from lowvram_db.atomic import replacing_file

SUFFIX = ".safetensors"
_NAME_LENGTH = 32  # hex digits of the header's digest: 128 bits
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Damaged(Exception):
    """A shard whose header is not the one it was written with."""


class Span(NamedTuple):
    """Where one tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int


class Entry(NamedTuple):
    """What one key stands for."""

    shard: "Shard"
    tensors: dict[str, Span]
    checksum: str  # SHA-256 of the tensors' bytes, by name


def write_shard(folder: Path, entries: dict[str, dict[str, Tensor]]) -> "Shard":
    """Write entries (key -> name -> tensor on the CPU) as a new file, whole or not at all.

    Raises UserError when the disk is full or the folder cannot be written.
    """
    tensors = {f"{key}.{name}": tensor.contiguous() for key, entry in entries.items() for name, tensor in entry.items()}
    checksums = {key: _checksum([_bytes_of(entry[name]) for name in sorted(entry)]) for key, entry in entries.items()}
    content = save(tensors, metadata=checksums)
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    path = folder / f"{_name(header)}{SUFFIX}"
    with replacing_file(path) as temporary:
        temporary.write_bytes(content)
    return Shard(path)


class Shard:
    """One file, read."""

    def __init__(self, path: Path):
        """Read the header alone. Raises Damaged, or OSError."""
        self.path = path
        with path.open("rb") as file:
            self.length = path.stat().st_size
            size = int.from_bytes(file.read(8), "little")
            if size > self.length:
                raise Damaged(f"{path}: cut off")
            file.seek(0)
            header = file.read(8 + size)
        if _name(header) != path.stem:
            raise Damaged(f"{path}: damaged header")
        self.entries = self._entries(json.loads(header[8:]), len(header))
        self.proper_length = max((s.stop for e in self.entries.values() for s in e.tensors.values()), default=0)
        self._map: mmap.mmap | None = None

    def _entries(self, header: dict[str, Any], data: int) -> dict[str, Entry]:
        entries = {key: Entry(self, {}, checksum) for key, checksum in header.pop("__metadata__").items()}
        for place, about in sorted(header.items()):
            key, _, name = place.partition(".")
            start, stop = about["data_offsets"]
            entries[key].tensors[name] = Span(_DTYPES[about["dtype"]], tuple(about["shape"]), data + start, data + stop)
        return entries

    def is_whole(self, entry: Entry) -> bool:
        """Whether an entry's bytes are the ones that were written. Raises OSError where the file is gone."""
        if any(span.stop > self.length for span in entry.tensors.values()):
            return False
        whole = _checksum([self.view(span) for span in entry.tensors.values()]) == entry.checksum
        self.let_go()
        return whole

    def view(self, span: Span) -> NDArray[np.uint8]:
        """One tensor's bytes, uint8 [n], in the file's map: to be copied, not to be kept."""
        return np.frombuffer(self.open(), np.uint8, span.stop - span.start, span.start)

    def open(self) -> mmap.mmap:
        """The file in memory, mapped when it is first wanted."""
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def close(self) -> None:
        """Unmap the file. It can be opened again."""
        self._map = None

    def let_go(self) -> None:
        """Let what was read leave this process's memory; the system's own cache of the file keeps it.

        The whole map: the system also maps what lies around the pages that were read.
        """
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def empty_batch(span: Span, rows: int) -> tuple[NDArray[np.uint8], Tensor]:
    """A tensor for `rows` tensors like the one at `span`, and its memory by rows, uint8 [rows, n]."""
    memory = np.empty((rows, math.prod(span.shape) * span.dtype.itemsize), np.uint8)
    return memory, torch.from_numpy(memory.reshape(-1)).view(span.dtype).view(rows, *span.shape)


def _name(header: bytes) -> str:
    return hashlib.sha256(header).hexdigest()[:_NAME_LENGTH]


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _checksum(parts: list[NDArray[np.uint8]]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data)
    return digest.hexdigest()
