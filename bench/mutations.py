"""How bench/fuzz.py spoils inputs: bytes of files, tags and chunks of photos, fields of configs, tensors of weights."""

import copy
import io
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

_VALUES = [None, True, False, 0, 1, -1, 3.5, 1e300, 2**63, "", "x", "\0", "ü" * 300, [], [0], [None], {}, {"a": 1}]


def spoil_bytes(content: bytes, chance: random.Random) -> bytes:
    """A few bits flipped, bytes replaced, a part cut out, doubled or zeroed, the end cut off, or nothing left."""
    spoiled = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 3, 20])):
        at = chance.randrange(len(spoiled) or 1)
        length = chance.choice([1, 4, 64, len(spoiled) // 3])
        match chance.choice(["flip", "byte", "byte", "number", "cut", "double", "zero", "end", "head", "nothing"]):
            case "flip" if spoiled:
                spoiled[at] ^= 1 << chance.randrange(8)
            case "byte" if spoiled:
                spoiled[at] = chance.randrange(256)
            case "number":
                spoiled[at : at + 4] = struct.pack("<I", chance.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
            case "cut":
                del spoiled[at : at + length]
            case "double":
                spoiled[at:at] = spoiled[at : at + length]
            case "zero":
                spoiled[at : at + length] = bytes(len(spoiled[at : at + length]))
            case "end":
                del spoiled[at:]
            case "head":
                spoiled[:0] = chance.choice([b"\xef\xbb\xbf", b"\0" * 8, b"<!DOCTYPE html>", b"\xff\xfe"])
            case "nothing" if chance.random() < 0.1:
                spoiled.clear()
    return bytes(spoiled)


def spoil_file(path: Path, chance: random.Random) -> None:
    path.write_bytes(spoil_bytes(path.read_bytes(), chance))


def photo_bytes(folder: Path, chance: random.Random) -> None:
    """A photo in one of the formats people have, then spoiled."""
    photo = chance.choice(sorted(folder.iterdir()))
    kind = chance.choice(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
    buffer = io.BytesIO()
    Image.open(photo).save(buffer, kind)
    photo.with_name(f"spoiled.{kind.lower()}").write_bytes(spoil_bytes(buffer.getvalue(), chance))


def photo_exif(folder: Path, chance: random.Random) -> None:
    """A JPEG whose EXIF directory has tags of any type, count and value, an orientation among them."""
    buffer = io.BytesIO()
    Image.open(min(folder.iterdir())).save(buffer, "JPEG")
    jpeg, order = buffer.getvalue(), chance.choice("<>")
    tags = [0x0112, *(chance.choice([0x0103, 0x010F, 0x011A, 0x8769, 0x8825, 0xA005, 0x0201]) for _ in range(5))]
    entries = b"".join(
        struct.pack(order + "HHI", tag, chance.choice([3, chance.randrange(14)]), chance.choice([1, 0, 7, 2**31]))
        + struct.pack(order + "I", chance.choice([6, 6 << 16, chance.randrange(2**32)]))
        for tag in tags
    )
    tiff = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4)
    segment = b"Exif\0\0" + (tiff if chance.random() < 0.7 else spoil_bytes(tiff, chance))
    marker = b"\xff\xe1" + struct.pack(">H", len(segment) + 2)
    (folder / "spoiled.jpg").write_bytes(jpeg[:2] + marker + segment + jpeg[2:])


def photo_chunks(folder: Path, chance: random.Random) -> None:
    """A PNG with chunks of text, profiles and times, of any size and content."""
    buffer = io.BytesIO()
    Image.open(min(folder.iterdir())).save(buffer, "PNG", pnginfo=PngInfo())
    png, kinds = buffer.getvalue(), [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"cHRM", b"tIME", b"xyZw"]
    chunks = b""
    for _ in range(chance.choice([1, 2, 9])):
        kind, length = chance.choice(kinds), chance.choice([0, 1, 20, 3000, 2_000_000])
        content = b"key\0\0" + chance.choice([zlib.compress(b"x" * length), chance.randbytes(length), b"x" * length])
        checksum = zlib.crc32(kind + content) if chance.random() < 0.9 else 7
        chunks += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    (folder / "spoiled.png").write_bytes(png[:33] + chunks + png[33:])


def toml_text(path: Path, chance: random.Random) -> None:
    """A config whose lines are lost, doubled, swapped, given other values, or whose bytes are spoiled."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if chance.random() < 0.3:
        spoil_file(path, chance)
        return
    for _ in range(chance.choice([1, 1, 3])):
        at = chance.randrange(len(lines))
        match chance.choice(["lose", "double", "swap", "value", "value", "key", "tail"]):
            case "lose" if len(lines) > 1:
                del lines[at]
            case "double":
                lines.insert(at, lines[at])
            case "swap":
                other = chance.randrange(len(lines))
                lines[at], lines[other] = lines[other], lines[at]
            case "value":
                written = chance.choice(
                    [json.dumps(chance.choice(_VALUES), ensure_ascii=False), "'C:\\x'", '"C:\\x"', "nan"]
                )
                lines[at] = lines[at].partition("=")[0] + "= " + written
            case "key":
                lines[at] = chance.choice(["x", "“", "[", "]", "="]) + lines[at]
            case "tail":
                lines[at] += chance.choice(['"', "#", " \t", "]", "\\", "\r"])
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")


def config_json(model: Path, chance: random.Random) -> None:
    """A field of one of a model's JSON files dropped, retyped or made up."""
    path = chance.choice([model / "model_index.json", *sorted(model.glob("*/*config.json"))])
    if chance.random() < 0.15:
        spoil_file(path, chance)
        return
    tree = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(chance.choice([1, 1, 2])):
        key = chance.choice(list(tree))
        match chance.choice(["drop", "value", "value", "item", "unknown"]):
            case "drop":
                tree.pop(key)
            case "value":
                tree[key] = copy.deepcopy(chance.choice(_VALUES))
            case "item" if isinstance(tree[key], list) and tree[key]:
                tree[key] = chance.choice([tree[key][:-1], [*tree[key], tree[key][0]], [*tree[key][:-1], None]])
            case "unknown":
                tree["made_up"] = chance.choice(_VALUES)
    path.write_text(json.dumps(tree), encoding="utf-8")


def weights(model: Path, chance: random.Random) -> None:
    """One of a model's weight files spoiled."""
    weight_file(chance.choice(sorted(model.glob("*/*.safetensors"))), chance)


def weight_file(path: Path, chance: random.Random) -> None:
    """A file spoiled in its bytes (the header mostly), its header edited, or tensors lost, renamed, reshaped or not
    finite."""
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    match chance.choice(["bytes"] * 3 + ["end"] + ["header"] * 2 + ["pointer"] + ["tensors"] * 4):
        case "bytes":
            path.write_bytes(spoil_bytes(content[:size], chance) + content[size:])
        case "end":
            path.write_bytes(content[: chance.randrange(len(content))])
        case "header":
            edited = json.dumps(_edited(json.loads(content[8:size]), chance)).encode()
            path.write_bytes(len(edited).to_bytes(8, "little") + edited + content[size:])
        case "pointer":
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", encoding="utf-8")
        case "tensors":
            save_file(_spoilt(load_file(path), chance), path, metadata={"format": "pt"})


def _edited(header: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """One entry of a safetensors header made another's, or changed in one field."""
    name, other = chance.sample(sorted(header.keys() - {"__metadata__"}), 2)
    match chance.choice(["other", "value", "dtype", "shape", "data_offsets", "renamed"]):
        case "other":
            header[name]["data_offsets"] = header[other]["data_offsets"]
        case "value":
            header[chance.choice([name, "__metadata__"])] = chance.choice(_VALUES)
        case "renamed":
            header[name + "x"] = header.pop(name)
        case "dtype":
            header[name]["dtype"] = chance.choice(["F32", "BF16", "I16", "F8_E4M3", "F64", *_VALUES])
        case "shape" | "data_offsets" as field:
            numbers = [number + chance.choice([0, 1, -1, 2**33, -(2**62)]) for number in header[name][field]]
            header[name][field] = chance.choice([numbers, numbers[::-1], chance.choice(_VALUES)])
    return header


def _spoilt(state: dict[str, torch.Tensor], chance: random.Random) -> dict[str, torch.Tensor]:
    for name in chance.sample(sorted(state), chance.choice([1, 1, 3])):
        tensor = state.pop(name)
        match chance.choice(["lost", "renamed", "reshaped", "half", "integers", "nan", "infinite", "more"]):
            case "renamed":
                state["module." + name] = tensor
            case "reshaped":
                state[name] = tensor[None].contiguous()
            case "half":
                state[name] = tensor.to(chance.choice([torch.float16, torch.bfloat16, torch.float64]))
            case "integers":
                state[name] = tensor.to(torch.int8)
            case "nan":
                state[name] = tensor.clone().fill_(torch.nan)
            case "infinite":
                state[name] = tensor.clone().fill_(-torch.inf)
            case "more":
                state |= {name: tensor, "made_up": tensor.clone()}
    return state


def any_file(pattern: str) -> Callable[[Path, random.Random], None]:
    """Spoils one file, or deletes it."""

    def spoil(folder: Path, chance: random.Random) -> None:
        path = chance.choice(sorted(file for file in folder.glob(pattern) if file.is_file()))
        if chance.random() < 0.1:
            path.unlink()
        else:
            spoil_file(path, chance)

    return spoil


SPOIL: dict[str, tuple[str, Callable[[Path, random.Random], Any]]] = {
    "photos, bytes": ("photos", photo_bytes),
    "photos, EXIF": ("photos", photo_exif),
    "photos, PNG chunks": ("photos", photo_chunks),
    "TOML": ("run.toml", toml_text),
    "model, JSON": ("model", config_json),
    "model, weights": ("model", weights),
    "model of one file": ("model.safetensors", weight_file),
    "checkpoint": ("runs/run/checkpoints", any_file("step-*/*")),
    "cache": ("runs/run/cache", any_file("**/*")),
    "metrics and other small files": ("runs/run", any_file("[mcp]*.*")),
}  # what is spoiled -> which path of a case's folder, and how
