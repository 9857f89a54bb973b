"""Other trainers, from a checkout that the user names, as processes of their own: bench/compare.py runs them.

A peer's script is not changed. It runs under this file as its launcher, which caps the allocator and notes the time
after every step of a torch optimizer: that is what all of them have in common.
"""

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from full_size import prepare
from recipes import Work, bytes_written, peaks, reset_peaks, settle

ROOT = Path(__file__).parents[1]
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
    with tempfile.TemporaryDirectory() as place:
        photos, class_images = _pictures(Path(place))
        words = KINDS[kind](folder, photos, class_images, Path(place), work, steps)
        result = Path(place) / "result.json"
        job = {"budget": budget, "device": device, "result": str(result)}
        command = [sys.executable, __file__, json.dumps(job), str(script.absolute()), *words]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": _python_path(script)}
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
        figures = json.loads(result.read_text()) if result.exists() else {}
    if "OutOfMemoryError" in done.stderr or "out of memory" in done.stderr:
        return {"recipe": kind, "outcome": "out of memory"}
    if done.returncode or "step_s" not in figures:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return {"recipe": kind, "outcome": f"failed ({done.returncode}): {last}"}
    figures["startup_s"] = figures.pop("first_done") - began
    return {"recipe": kind, "outcome": "ok", **figures}


def _python_path(script: Path) -> str:
    return os.pathsep.join([str(script.absolute().parent), *filter(None, [os.environ.get("PYTHONPATH")])])


def _pictures(place: Path) -> tuple[Path, Path]:
    """Photos and class images, in folders whose names sd-scripts reads as repeats and prompt."""
    from lowvram_db.demo.miniature import write_photos

    for name, count in (("photos/1_ohwx dog", 4), ("class/1_dog", 4)):
        write_photos(place / name, count=count, side=512)
    return place / "photos" / "1_ohwx dog", place / "class" / "1_dog"


def _diffusers(model: Path, photos: Path, class_images: Path, out: Path, work: Work, steps: int) -> list[str]:
    """The low-memory flags of its README: 8-bit Adam, checkpointing, mixed precision, gradients set to None."""
    prior = ["--with_prior_preservation", "--class_data_dir", str(class_images), "--class_prompt", _CLASS_PROMPT]
    return [
        *("--pretrained_model_name_or_path", str(model), "--instance_data_dir", str(photos)),
        *("--instance_prompt", _PROMPT, "--output_dir", str(out / "out"), "--resolution", str(work.resolution)),
        *("--train_batch_size", str(work.batch), "--max_train_steps", str(steps + 1), "--learning_rate", "2e-6"),
        *("--mixed_precision", "no" if work.compute == "fp32" else work.compute, "--seed", str(work.seed)),
        *("--use_8bit_adam", "--gradient_checkpointing", "--set_grads_to_none"),
        *([*prior, "--num_class_images", "4"] if work.prior else []),
        *(["--enable_xformers_memory_efficient_attention"] if work.attention == "xformers" else []),
    ]


def _sd_scripts(model: Path, photos: Path, class_images: Path, out: Path, work: Work, steps: int) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(model), "--train_data_dir", str(photos.parent)),
        *(["--reg_data_dir", str(class_images.parent)] if work.prior else []),
        *("--output_dir", str(out / "out"), "--output_name", "peer", "--resolution", str(work.resolution)),
        *("--train_batch_size", str(work.rows), "--max_train_steps", str(steps + 1), "--learning_rate", "2e-6"),
        *("--mixed_precision", "no" if work.compute == "fp32" else work.compute, "--seed", str(work.seed)),
        *(
            "--optimizer_type",
            "AdamW8bit",
            "--gradient_checkpointing",
            "--cache_latents",
            "--stop_text_encoder_training=-1",
        ),
        "--xformers" if work.attention == "xformers" else "--sdpa",
    ]


KINDS: dict[str, Callable[[Path, Path, Path, Path, Work, int], list[str]]] = {
    "diffusers": _diffusers,
    "sd-scripts": _sd_scripts,
}


def _launch(job: dict[str, Any], script: str, words: list[str]) -> None:
    """In the peer's process: watch, then run its script as if it had been called."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from lowvram_db.memory.budget import cap

    device = torch.device(job["device"])
    cap(job["budget"], device)
    times: list[float] = []

    def after_step(*_: Any) -> None:
        settle(device)
        times.append(time.time())
        if len(times) == 1:
            reset_peaks(device)

    register_optimizer_step_post_hook(after_step)

    def leave() -> None:
        if len(times) > 1:
            seconds = sorted(after - before for before, after in pairwise(times))
            figures = {
                "first_done": times[0],
                "step_s": seconds[len(seconds) // 2],
                "low_s": seconds[len(seconds) // 4],
                "high_s": seconds[3 * len(seconds) // 4],
                "written_mib": bytes_written() / 2**20,
                **peaks(device),
            }
            Path(job["result"]).write_text(json.dumps(figures))

    atexit.register(leave)
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _launch(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:])
