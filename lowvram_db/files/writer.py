"""Write a safetensors file: the header first, then tensor by tensor and slice by slice.

safetensors' own save_file gives the same bytes, but copies every CUDA tensor to host memory and keeps all of the copies
until the file is written: 10.3 GB for SDXL in float32.
"""

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

_SLICE = 64 * 2**20  # bytes that leave the device at once
# In the order of safetensors' own files: the widest come first, so that each tensor lies on a multiple of its width.
_NAMES = {
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
_PLACES = {dtype: place for place, dtype in enumerate(_NAMES)}


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write tensors of any device, shape and strides by their names; returns the CRC-32 of the file.

    dtype: of floating-point tensors in the file; default: each one's own. Takes less than 400 MB beside the tensors.
    Raises KeyError for a dtype that is not in _NAMES, and OSError as the disk does.
    """
    dtypes = {name: (dtype or t.dtype) if t.is_floating_point() else t.dtype for name, t in tensors.items()}
    names = sorted(tensors, key=lambda name: (_PLACES[dtypes[name]], name))
    head = _header([(name, dtypes[name], tensors[name].shape) for name in names], metadata)
    with path.open("wb") as file:
        file.write(head)
        checksum = zlib.crc32(head)
        for name in names:
            for piece in _slices(tensors[name].detach()):
                # To the host as it is: a card that is full has no room for another precision or order.
                values = _bytes(piece.cpu().to(dtypes[name]).contiguous())
                file.write(values)
                checksum = zlib.crc32(values, checksum)
    return checksum


def overflowing(tensors: Iterable[Tensor], dtype: torch.dtype) -> int:
    """How many of the tensors hold a number larger than dtype has."""
    most = torch.finfo(dtype).max
    ranges = [torch.aminmax(tensor.detach()) for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return sum(bool(low < -most or high > most) for low, high in ranges)


def _header(entries: list[tuple[str, torch.dtype, torch.Size]], metadata: Mapping[str, str] | None) -> bytes:
    """Its length in 8 bytes, then JSON with spaces up to a multiple of 8."""
    tree: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in entries:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        tree[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _slices(tensor: Tensor) -> Iterator[Tensor]:
    """Its elements in logical order, at most _SLICE bytes at once."""
    if tensor.nbytes <= _SLICE:
        yield tensor
    elif rows := len(tensor) * _SLICE // tensor.nbytes:
        yield from tensor.split(rows)
    else:
        for row in tensor:
            yield from _slices(row)


def _bytes(values: Tensor) -> memoryview:
    """A contiguous tensor's memory; whatever strides it gives for dimensions that have one element."""
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy().data
