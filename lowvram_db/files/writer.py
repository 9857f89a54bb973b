"""Write a safetensors file: the header first, then tensor by tensor and slice by slice.

safetensors' own save_file gives the same bytes, but copies every CUDA tensor to host memory and keeps all of the copies
until the file is written: 10.3 GB for SDXL in float32.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_SLICE = 64 * 2**20  # bytes that leave the device at once
# In the order of safetensors' own files: the widest come first, so that each tensor lies on a multiple of its width.
NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
_PLACES = {dtype: place for place, dtype in enumerate(NAMES)}


class Planned(NamedTuple):
    """A tensor that is going to be written, and need not be in memory before."""

    dtype: torch.dtype  # in the file
    shape: tuple[int, ...]
    read: Callable[[], Tensor]  # of any floating-point dtype where `dtype` is one


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write tensors of any device, shape and strides by their names; returns the CRC-32 of the file.

    dtype: of floating-point tensors in the file; default: each one's own. Takes less than 400 MB beside the tensors.
    Raises KeyError for a dtype that is not in NAMES, and OSError as the disk does.
    """
    kinds = {name: (dtype or t.dtype) if t.is_floating_point() else t.dtype for name, t in tensors.items()}
    planned = {
        name: Planned(kinds[name], tuple(t.shape), partial(tensors.__getitem__, name)) for name, t in tensors.items()
    }
    return write_planned(path, planned, metadata)


def write_planned(path: Path, planned: Mapping[str, Planned], metadata: Mapping[str, str] | None = None) -> int:
    """The same, of tensors that are read one after the other."""
    head = _header(planned, metadata)
    with path.open("wb") as file:
        file.write(head)
        checksum = zlib.crc32(head)
        for values in _values(planned):
            file.write(values)
            checksum = zlib.crc32(values, checksum)
    return checksum


def write_hashed(path: Path, planned: Mapping[str, Planned], metadata: Mapping[str, str], key: str) -> None:
    """Write tensors as they are read, one after the other; the metadata get a further `key`: the SHA-256 of what stands
    behind the header, with 0x before it, as model sites tell files by it.

    Takes and raises what write_tensors does.
    """
    with path.open("wb") as file:
        file.write(_header(planned, {**metadata, key: f"0x{'0' * 64}"}))
        sha = hashlib.sha256()
        for values in _values(planned):
            file.write(values)
            sha.update(values)
        file.seek(0)
        file.write(_header(planned, {**metadata, key: f"0x{sha.hexdigest()}"}))


def overflowing(tensors: Iterable[Tensor], dtype: torch.dtype) -> int:
    """How many of the tensors hold a number larger than dtype has."""
    most = torch.finfo(dtype).max
    ranges = [torch.aminmax(tensor.detach()) for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return sum(bool(low < -most or high > most) for low, high in ranges)


def _in_order(planned: Mapping[str, Planned]) -> list[str]:
    return sorted(planned, key=lambda name: (_PLACES[planned[name].dtype], name))


def _values(planned: Mapping[str, Planned]) -> Iterator[memoryview]:
    """The bytes of all tensors in the order of the file, a slice at once."""
    for name in _in_order(planned):
        for piece in slices_of(planned[name].read().detach()):
            # To the host as it is: a card that is full has no room for another precision or order.
            yield values_of(piece.cpu().to(planned[name].dtype).contiguous())


def _header(planned: Mapping[str, Planned], metadata: Mapping[str, str] | None) -> bytes:
    """Its length in 8 bytes, then JSON with spaces up to a multiple of 8."""
    tree: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in _in_order(planned):
        dtype, shape, _ = planned[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        tree[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def slices_of(tensor: Tensor) -> Iterator[Tensor]:
    """Its elements in logical order, at most _SLICE bytes at once."""
    if tensor.nbytes <= _SLICE:
        yield tensor
    elif rows := len(tensor) * _SLICE // tensor.nbytes:
        yield from tensor.split(rows)
    else:
        for row in tensor:
            yield from slices_of(row)


def values_of(values: Tensor) -> memoryview:
    """A contiguous tensor's memory; whatever strides it gives for dimensions that have one element."""
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy().data
