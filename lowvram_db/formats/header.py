"""The header of a safetensors file: which tensors it has and where they lie, without any of them, and without torch.

The format's own reader finds the same faults and says them in its own words; nothing is handed to it that does not pass
here.
"""

import json
import math
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lowvram_db.errors import UserError
from lowvram_db.files.stand_in import refuse_stand_in

_LONGEST = 32 * 2**20  # bytes of a header; that of SDXL, with training metadata and a picture, has half of one
_MOST_DIMENSIONS = 16
_DAMAGED = "it is damaged, or was not downloaded to its end"
_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_UNPACKED = {"F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f"}
_OTHERS = {
    b"GGUF": "is a GGUF file, whose weights are quantised, and cannot be trained; get the model as .safetensors",
    b"PK\x03\x04": "is a pickle by its content; give it a name that ends in .ckpt, or get it as .safetensors",
    b"\x80\x02": "is a pickle by its content; give it a name that ends in .ckpt, or get it as .safetensors",
}


def is_pickle(path: Path) -> bool:
    """Whether a file has the name of one."""
    return path.suffix.lower() in (".ckpt", ".bin", ".pt", ".pth")


class Entry(NamedTuple):
    """What a file says of a tensor."""

    dtype: str  # as safetensors calls it, for example "BF16"
    shape: tuple[int, ...]
    begin: int = 0  # bytes, from the first tensor's first
    end: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Described(Protocol):
    """What is known of a model's file before its tensors are read."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]

    def numbers(self, key: str) -> list[float]:
        """Of a small tensor."""


class Header:
    """Of one file. Raises UserError for what is no safetensors file, or is not whole."""

    def __init__(self, path: Path):
        self.path = path
        self.entries, self.metadata, self.size = read_header(path)

    def numbers(self, key: str) -> list[float]:
        """Of a small tensor of floating-point numbers; none of another."""
        dtype, _, begin, end = self.entries[key]
        with self.path.open("rb") as file:
            file.seek(self.size + begin)
            content = file.read(end - begin)
        if dtype == "BF16":  # float32 without its last two bytes
            content = b"".join(b"\0\0" + content[place : place + 2] for place in range(0, len(content), 2))
        return [number for (number,) in struct.iter_unpack(_UNPACKED[dtype], content)] if dtype in _UNPACKED else []


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str], int]:
    """A file's tensors, its metadata, and how many bytes come before the first tensor. Raises UserError as Header."""
    refuse_stand_in(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            head = file.read(8)
            length = int.from_bytes(head, "little")
            for beginning, meaning in _OTHERS.items():
                if head.startswith(beginning) and length > _LONGEST:
                    raise UserError(f"{path}: {meaning}")
            if size < 8 or (length <= _LONGEST and size < 8 + length):
                raise UserError(f"{path}: ends within its header; {_DAMAGED}")
            if length > _LONGEST:
                raise UserError(f"{path}: claims a header of {length / 1e6:.0f} MB; it is damaged, or no .safetensors")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return _checked(_parsed(text), size - 8 - length, 8 + length)
    except ValueError as error:
        raise UserError(f"{path}: {error}; {_DAMAGED}") from error


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(text.decode("utf-8"), object_pairs_hook=_once_each)
    except UnicodeDecodeError as error:
        raise ValueError("its header is no text") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is no JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(tree, dict):
        raise ValueError("its header is no JSON object")
    return tree


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its header has {_shown(next(n for n in names if names.count(n) > 1))} twice")
    return tree


def _checked(tree: dict[str, Any], size: int, before: int) -> tuple[dict[str, Entry], dict[str, str], int]:
    """size: bytes of all tensors. before: those before the first. Raises ValueError."""
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata in its header are not texts by their names")
    tensors = {name: _entry(name, value) for name, value in tree.items()}
    if not tensors:
        raise ValueError("it has no tensor")
    ordered = sorted(tensors, key=lambda name: (tensors[name].begin, tensors[name].end))
    first, last = tensors[ordered[0]], tensors[ordered[-1]]
    for one, other in pairwise(ordered):
        gap = tensors[other].begin - tensors[one].end
        if gap:
            how = f"overlap by {-gap} bytes" if gap < 0 else f"have {gap} bytes between them that belong to no tensor"
            raise ValueError(f"{_shown(one)} and {_shown(other)} {how}")
    if first.begin:
        raise ValueError(f"its first tensor begins after {first.begin} bytes that belong to none")
    if last.end > size:
        raise ValueError(f"{(last.end - size) / 1e6:.1f} MB of its {last.end / 1e6:.1f} are missing")
    if last.end < size:
        raise ValueError(f"{size - last.end} bytes at its end belong to no tensor")
    return tensors, metadata, before


def _entry(name: str, value: Any) -> Entry:
    try:
        name.encode()
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
    except (UnicodeEncodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its header has no dtype, shape and two offsets for {_shown(name)}") from error
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{_shown(name)} is of a kind {_shown(str(dtype))} that is not known")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{_shown(name)} has no shape and offsets that a tensor can have")
    entry = Entry(dtype, tuple(shape), begin, end)
    if (end - begin) * 8 != entry.numel * _BITS[dtype]:
        raise ValueError(f"{_shown(name)} has {end - begin} bytes, which its shape {shape} of {dtype} does not take")
    return entry


def _shown(name: str) -> str:
    return repr(name) if len(name) <= 100 else repr(name[:100]) + "..."
