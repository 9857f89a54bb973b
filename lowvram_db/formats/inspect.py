"""What a model is, in a second: from its headers and config files, without its weights and without torch."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowvram_db.errors import UserError
from lowvram_db.files.foreign import read_json
from lowvram_db.formats.content import TRAINABLE, Content, content_of, missing
from lowvram_db.formats.header import Described, Entry, Header, is_pickle
from lowvram_db.formats.kinds import FAMILY_WORDS
from lowvram_db.formats.layout import LAYOUTS
from lowvram_db.formats.prediction import prediction_of

_SPOKEN = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64"}
_RESOLUTIONS = {"sd1": 512, "sd2": 768, "sdxl": 1024}
_SD2_BASE = 512  # which predicts the noise
_PIPELINES = {"StableDiffusionPipeline": "sd1", "StableDiffusionXLPipeline": "sdxl"}
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Of what trainers leave in a header, the lines that say most in the fewest words.
_TRAINING = (
    "modelspec.title", "modelspec.author", "modelspec.license", "modelspec.trigger_phrase", "modelspec.usage_hint",
    "ss_output_name", "ss_sd_model_name", "ss_base_model_version", "ss_num_train_images", "ss_steps", "ss_epoch",
    "ss_learning_rate", "ss_optimizer", "ss_resolution", "ss_network_module", "ss_network_dim", "ss_network_alpha",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What there is to know. `problem` says why it cannot be trained here, where it cannot."""

    path: Path
    kind: str
    family: str | None = None
    problem: str | None = None
    prediction: str = ""  # with how it is known
    resolution: int | None = None  # pixels a side that the model was made for
    parts: dict[str, str] = field(default_factory=dict)  # with their sizes and precisions
    precision: str | None = None  # of the UNet: "fp16", "bf16", "fp32"
    ema: bool = False
    said: dict[str, str] = field(default_factory=dict)  # of its training
    hashes: dict[str, str] = field(default_factory=dict)

    def lines(self) -> Iterable[tuple[str, str]]:
        """For people."""
        yield "kind", self.kind
        if self.prediction:
            yield "predicts", self.prediction
        if self.resolution:
            yield "made for", f"{self.resolution} pixels a side"
        yield from self.parts.items()
        if self.ema:
            yield "averaged", "has the UNet's averaged weights, too (model.ema = true trains them)"
        yield from self.said.items()
        yield from self.hashes.items()
        yield "training", f"not here: {self.problem}" if self.problem else "possible here"


def inspect(path: Path, whole: bool = False) -> Report:
    """Look at a model's file, or at a folder in diffusers' format. Raises UserError for what is damaged, or neither.

    whole: read all of a file for the hash by which web UIs and model sites know it. A pickle takes longer than a
    second: torch has to open it.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    return _file(described(path), whole)


def described(path: Path) -> Described:
    """What a model's file has. Raises UserError where it is damaged, or none."""
    if not is_pickle(path):
        return Header(path)
    from lowvram_db.formats.tensors import tensors_of  # torch, which takes seconds

    return tensors_of(path)


def _file(file: Described, whole: bool) -> Report:
    hashes = _hashes(file, whole)
    said = {key.removeprefix("modelspec."): _shown(file.metadata[key]) for key in _TRAINING if key in file.metadata}
    try:
        content = content_of(file)
    except UserError as error:
        return Report(
            file.path, "a model of an unknown kind", problem=_without(file.path, error), said=said, hashes=hashes
        )
    if content.kind.family is None:
        return Report(file.path, content.kind.words, problem="of another kind", said=said, hashes=hashes)
    family = content.kind.family
    predicts, how, zero_snr = prediction_of(file, family)
    keys = {part: dict.fromkeys(place.key for place in places.values()) for part, places in content.parts.items()}
    parts = {part: [file.entries[key] for key in of_part] for part, of_part in keys.items()}
    return Report(
        file.path,
        content.kind.words,
        family,
        problem=_problem(content, parts, predicts),
        prediction=f"{predicts or 'not known'}, {how}" + (", with zero terminal SNR" if zero_snr else ""),
        resolution=_SD2_BASE if family == "sd2" and predicts == "epsilon" else _RESOLUTIONS[family],
        parts={part: _described_part(entries) for part, entries in parts.items()},
        precision=_precision(parts.get("unet", [])),
        ema=content.ema,
        said=said,
        hashes=hashes,
    )


def _problem(content: Content, parts: dict[str, list[Entry]], predicts: str | None) -> str | None:
    if lacking := missing(content.kind.family or "", parts):
        return f"it {lacking}"
    others = {entry.dtype for entries in parts.values() for entry in entries} - set(TRAINABLE)
    if others:
        return f"weights are stored as {', '.join(sorted(others))}; get it in fp16, bf16 or fp32"
    if predicts is None:
        return "what its UNet predicts is not said in it; set model.prediction_type"
    return None


def _described_part(entries: list[Entry]) -> str:
    counts = Counter({entry.dtype: 0 for entry in entries})
    for entry in entries:
        counts[entry.dtype] += entry.numel
    kinds = ", ".join(f"{_SPOKEN.get(kind, kind)}" for kind, _ in counts.most_common())
    return f"{counts.total() / 1e6:.1f} M weights in {len(entries)} tensors, {kinds}"


def _precision(entries: list[Entry]) -> str | None:
    kinds = Counter(entry.dtype for entry in entries).most_common(1)
    return _SPOKEN.get(kinds[0][0]) if kinds else None


def _hashes(file: Described, whole: bool) -> dict[str, str]:
    """As web UIs show them: of 64 KiB behind the first MiB, and of all; and as model sites have that of the tensors."""
    with file.path.open("rb") as stream:
        stream.seek(0x100000)
        hashes = {"old hash": hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]}
        if whole:
            stream.seek(0)
            hashes["hash"] = hashlib.file_digest(stream, "sha256").hexdigest()[:10]
    if said := file.metadata.get("modelspec.hash_sha256", "").removeprefix("0x"):
        hashes["hash of the tensors"] = f"{said[:12]}, as its header says"
    return hashes


def _folder(path: Path) -> Report:
    index = read_json(path / "model_index.json", "a model folder in diffusers' format has one")
    pipeline = index.get("_class_name")
    family = _PIPELINES.get(pipeline) if isinstance(pipeline, str) else None
    if family is None:
        return Report(path, f"a {pipeline} in diffusers' format", problem="of another kind")
    unet = read_json(path / "unet" / "config.json", "a Stable Diffusion model folder has one")
    if family == "sd1" and unet.get("use_linear_projection") is True:
        family = "sd2"
    parts = {part: entries for part in _PARTS if (entries := _entries(path / part))}
    scheduler = path / "scheduler" / "scheduler_config.json"
    settings = read_json(scheduler, "the noise schedule and prediction type stand in it")
    takes = unet.get("in_channels", 4)
    lacking = [part for part in LAYOUTS[family] if not (path / part).is_dir()]
    return Report(
        path,
        f"{FAMILY_WORDS[family]}, in diffusers' format",
        family,
        problem=f"it has no {lacking[0]}/" if lacking else f"its UNet takes {takes} channels" if takes != 4 else None,
        prediction=f"{settings.get('prediction_type', 'epsilon')}, by {scheduler.name}"
        + (", with zero terminal SNR" if settings.get("rescale_betas_zero_snr") is True else ""),
        resolution=_resolution(path, unet) or _RESOLUTIONS[family],
        parts={part: _described_part(entries) for part, entries in parts.items()},
        precision=_precision(parts.get("unet", [])),
    )


def _resolution(path: Path, unet: dict[str, Any]) -> int | None:
    """None where the config files do not say it."""
    size, blocks = unet.get("sample_size"), read_json(path / "vae" / "config.json", "").get("block_out_channels")
    return size * 2 ** (len(blocks) - 1) if type(size) is int and isinstance(blocks, list) and blocks else None


def _entries(folder: Path) -> list[Entry]:
    """Of the files that a loader takes; none where they are pickles."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    names = sorted(set(map(str, read_json(indices[0], "").get("weight_map", {}).values()))) if indices else [
        "diffusion_pytorch_model.safetensors",
        "model.safetensors",
    ]  # fmt: skip
    headers = [Header(folder / name) for name in names if (folder / name).is_file()]
    return [entry for header in headers for entry in header.entries.values()]


def _shown(text: str) -> str:
    """What a stranger wrote, fit for a terminal."""
    plain = "".join(letter if letter.isprintable() else " " for letter in text)
    return plain if len(plain) <= 100 else plain[:100] + "..."


def _without(path: Path, error: UserError) -> str:
    return str(error).removeprefix(f"{path}: ")
