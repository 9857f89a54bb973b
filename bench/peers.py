"""Other trainers, from a checkout that the user names, as processes of their own: bench/compare.py runs them.

A peer's script is not changed: it runs under peer_launch.py, by the Python of the checkout's own virtual environment
(`venv` or `.venv` in it, for its pins are not ours) or, where there is none, by this one. It gets the flags that its
documentation names against a shortage of memory, but for those that give up precision, such as sd-scripts'
--full_fp16: the work is the same for all. On a CPU that would only emulate half precision they go without mixed
precision, as ours computes in float32 there. Both encode prompts of their own and load their own photos; what that
costs is part of their step.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from full_size import prepare
from recipes import LR, Work

from lowvram_db.demo.miniature import write_photos
from lowvram_db.memory.device import emulation
from lowvram_db.memory.overheads import CONTEXT

ROOT = Path(__file__).parents[1]
_LAUNCHER = Path(__file__).with_name("peer_launch.py")
_PROMPT, _CLASS_PROMPT = "a photo of a ohwx dog", "a photo of a dog"


def run_peer(
    kind: str, script: Path, model: str, work: Work, device: str, steps: int, budget: int | None
) -> dict[str, Any]:
    """One result, as compare.py's own recipes give it; whatever goes wrong is its outcome."""
    if not script.is_file():
        return {"recipe": kind, "outcome": f"failed: there is no {script}"}
    if model == "sdxl":
        return {"recipe": kind, "outcome": "failed: no folder of SDXL weights; name one with --model"}
    folder = Path(model).absolute()
    if model == "sd15":
        folder = prepare(ROOT / "runs" / "sd15-random").parent / "model"
    if emulation(work.compute, torch.device(device)):
        work = replace(work, compute="fp32")
    recipe = f"{kind} {commit_of(script)}".strip()
    with tempfile.TemporaryDirectory() as place:
        photos, class_images = _pictures(Path(place))
        words = KINDS[kind](folder, photos, class_images, Path(place), work, steps)
        result = Path(place) / "result.json"
        limit = None if budget is None else max(0, budget - CONTEXT)
        job = {"limit": limit, "device": device, "result": str(result)}
        command = [python_of(script), str(_LAUNCHER), json.dumps(job), str(script.absolute()), *words]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
        figures = json.loads(result.read_text()) if result.exists() else {}
    said = {"recipe": recipe, "made_with": figures.pop("made_with", {})}
    if "OutOfMemoryError" in done.stderr or "out of memory" in done.stderr:
        return {**said, "outcome": "out of memory"}
    if done.returncode or figures.get("steps") != steps:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return {**said, "outcome": f"failed ({done.returncode}): {last}"}
    figures["startup_s"] = figures.pop("first_done") - began
    return {**said, "outcome": "ok", **figures}


def _checkout(script: Path) -> list[Path]:
    """The folders from the script's own up to the checkout's root; its own alone if there is none but our own."""
    folders = list(script.absolute().parents)
    roots = [place for place, folder in enumerate(folders) if (folder / ".git").exists() and folder != ROOT]
    return folders[: roots[0] + 1] if roots else folders[:1]


def commit_of(script: Path) -> str:
    """Of the checkout, short; empty if it is none."""
    folder = _checkout(script)[-1]
    words = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() if (folder / ".git").exists() else ""


def python_of(script: Path) -> str:
    places = [folder / name / "bin" / "python" for folder in _checkout(script) for name in ("venv", ".venv")]
    return next((str(place) for place in places if place.exists()), sys.executable)


def _pictures(place: Path) -> tuple[Path, Path]:
    """Photos and class images, in folders whose names sd-scripts reads as repeats and prompt."""
    for name, count in (("photos/1_ohwx dog", 4), ("class/1_dog", 4)):
        write_photos(place / name, count=count, side=512)
    return place / "photos" / "1_ohwx dog", place / "class" / "1_dog"


def _diffusers(model: Path, photos: Path, class_images: Path, out: Path, work: Work, steps: int) -> list[str]:
    """8-bit Adam, checkpointing, mixed precision, gradients set to None, prompts encoded beforehand."""
    prior = ["--with_prior_preservation", "--class_data_dir", str(class_images), "--class_prompt", _CLASS_PROMPT]
    return [
        *("--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(photos)),
        *("--instance_prompt", _PROMPT, "--output_dir", str(out / "out"), *_common(work, work.batch, steps)),
        *("--use_8bit_adam", "--gradient_checkpointing", "--set_grads_to_none", "--pre_compute_text_embeddings"),
        *([*prior, "--num_class_images", "4"] if work.prior else []),
        *(["--enable_xformers_memory_efficient_attention"] if work.attention == "xformers" else []),
    ]


def _sd_scripts(model: Path, photos: Path, class_images: Path, out: Path, work: Work, steps: int) -> list[str]:
    """8-bit Adam, checkpointing, mixed precision, latents encoded beforehand; only the UNet is trained.

    Its tokenizer would come from the hub: it looks into this cache first. The optimizer goes by its full name because
    of 48d368f, where plain AdamW8bit is made twice and finds no weights the second time, unless the text encoder is
    trained too."""
    tokenizers = out / "tokenizers"
    tokenizers.mkdir()
    (tokenizers / "openai_clip-vit-large-patch14").symlink_to(model / "tokenizer")
    return [
        *("--pretrained_model_name_or_path", str(model), "--tokenizer_cache_dir", str(tokenizers)),
        *("--train_data_dir", str(photos.parent)),
        *(["--reg_data_dir", str(class_images.parent)] if work.prior else []),
        *("--output_dir", str(out / "out"), "--output_name", "peer", *_common(work, work.rows, steps)),
        *("--optimizer_type", "bitsandbytes.optim.AdamW8bit", "--gradient_checkpointing", "--cache_latents"),
        "--stop_text_encoder_training=-1",
        "--xformers" if work.attention == "xformers" else "--sdpa",
    ]


def _common(work: Work, rows: int, steps: int) -> list[str]:
    """Flags that both know by the same names; one step more, which does not count."""
    return [
        *("--resolution", str(work.resolution), "--train_batch_size", str(rows), "--max_train_steps", str(steps + 1)),
        *("--mixed_precision", "no" if work.compute == "fp32" else work.compute, "--seed", str(work.seed)),
        *("--learning_rate", str(LR)),
    ]


KINDS: dict[str, Callable[[Path, Path, Path, Path, Work, int], list[str]]] = {
    "diffusers": _diffusers,
    "sd-scripts": _sd_scripts,
}
