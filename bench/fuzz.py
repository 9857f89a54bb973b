"""Spoiled inputs through the real command line: is the answer one line, or a right result?

    python bench/fuzz.py --cases 500
    python bench/fuzz.py --cases 50 --kind "photos, EXIF" --seed 7

Each case spoils one input of a small run (mutations.py) and has `lowvram-db` work on it. A fault is a traceback,
another exit code than 0, 2 or 3, more than 3 minutes, a changed file of the user's, or a wrong result: a model with
weights that are no numbers, or, where only files of ours were spoiled, another model than the one of a run that was
left alone. Faults are kept in --out. Rows go to bench/results/fuzz.csv.
"""

import argparse
import gc
import hashlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import add_row
from mutations import SPOIL
from safetensors.torch import load_file

from lowvram_db.demo.miniature import (
    MINIATURE_TEXT,
    MINIATURE_UNET,
    MINIATURE_VAE,
    write_photos,
    write_pipeline,
)

_SECONDS = 180  # longer than any case takes where other work is in the way
_SETTINGS = """\
[model]
name = "model"

[subject]
photos = "photos"
identifier = "ohwx"
class = "ball"

[prior]
count = 2
steps = 1
batch = 1

[train]
resolution = 64
steps = {steps}
lr = 1e-3

[precision]
compute = "fp32"

[optimizer]
name = "adamw"

[sample]
prompts = ["a {{identifier}} {{class}}"]
guidance = [2.0]
seeds = 1
steps = 1

[checkpoint]
every = 1
keep = 2
"""
# Of such widths that a single file tells all of its config.
_MODEL: dict[str, Any] = {
    "unet": MINIATURE_UNET
    | {"block_out_channels": (64, 128), "cross_attention_dim": 64, "attention_head_dim": 8, "norm_num_groups": 32},
    "vae": MINIATURE_VAE | {"block_out_channels": (32,) * 4, "norm_num_groups": 32},
    "text": MINIATURE_TEXT | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1},
}
_UNET = Path("runs/run/model/unet/diffusion_pytorch_model.safetensors")


class Verdict(NamedTuple):
    kind: str
    seed: int
    outcome: str  # "right", "refused", or what is wrong
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--kind", choices=list(SPOIL), help="only this one")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="folder for the cases with a fault; default: a new one")
    arguments = parser.parse_args()
    out = arguments.out or Path(tempfile.mkdtemp(prefix="fuzz-faults-"))
    kinds = [arguments.kind] if arguments.kind else list(SPOIL)
    cases = [(kinds[number % len(kinds)], arguments.seed + number) for number in range(arguments.cases)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.workers) as pool:
        place = Path(folder)
        prepare(place)
        verdicts = list(pool.map(lambda case: judged(place, case[0], case[1], out), cases))
    for kind in kinds:
        report(kind, [verdict for verdict in verdicts if verdict.kind == kind], arguments.seed)
    sys.exit(any(verdict.outcome not in ("right", "refused") for verdict in verdicts))


def report(kind: str, verdicts: list[Verdict], seed: int) -> None:
    counts = Counter(verdict.outcome for verdict in verdicts)
    faults = {outcome: count for outcome, count in counts.items() if outcome not in ("right", "refused")}
    row = {
        "spoiled": kind,
        "cases": len(verdicts),
        "right result": counts["right"],
        "refused in one line": counts["refused"],
        "faults": sum(faults.values()),
        "longest s": f"{max((verdict.seconds for verdict in verdicts), default=0):.1f}",
        "first seed": seed,
    }
    add_row("fuzz", row)
    print(", ".join(f"{key}: {value}" for key, value in row.items()), *faults.items(), flush=True)


def prepare(place: Path) -> None:
    """A model, photos, a run that was stopped halfway, and one that was left alone."""
    for name, steps in (("straight", 4), ("halfway", 2)):
        folder = place / name
        write_pipeline(folder / "model", **_MODEL)
        write_photos(folder / "photos", count=3, side=80)
        (folder / "run.toml").write_text(_SETTINGS.format(steps=steps), encoding="utf-8")
        for words in (["train", "run.toml"], ["export", "model", "--out", "model.safetensors"]):
            code, _ = command(folder, *words)
            assert code == 0, (folder / "log").read_text()
        (folder / "run.toml").write_text(_SETTINGS.format(steps=4), encoding="utf-8")


def judged(place: Path, kind: str, seed: int, out: Path) -> Verdict:
    """Spoil a copy of the run that was stopped halfway, and see what comes of it."""
    part, spoil = SPOIL[kind]
    ours = part.startswith("runs")
    case = place / f"case-{seed}"
    shutil.copytree(place / "halfway", case, ignore=None if ours else shutil.ignore_patterns("runs"))
    spoil(case / part, random.Random(seed))
    before = digests(case)
    words = ["plan", "run.toml", "--vram", "12GiB"] if kind == "TOML" else ["train", "run.toml"]
    words += [] if ours or kind == "TOML" else ["--set", "train.steps=1"]
    if part == "model.safetensors":
        words += [
            "--set",
            f"model.name={part}",
            "--set",
            "model.tokenizer=model/tokenizer",
            "--set",
            "prior.enabled=false",
        ]
    code, seconds = command(case, *words)
    outcome = verdict_of(case, place, code, before, ours, trained=words[0] == "train")
    if outcome not in ("right", "refused"):
        print(f"{kind}, seed {seed}: {outcome}", flush=True)
        shutil.copytree(case, out / f"{kind}-{seed}", dirs_exist_ok=True)
    shutil.rmtree(case)
    return Verdict(kind, seed, outcome, seconds)


def verdict_of(case: Path, place: Path, code: int | None, before: dict[Path, str], ours: bool, trained: bool) -> str:
    lines = (case / "log").read_text(encoding="utf-8", errors="replace").splitlines()
    if code is None:
        return f"more than {_SECONDS} s"
    if any(line.startswith("Traceback") for line in lines):
        return f"traceback: {lines[-1][:160]}"
    if digests(case) != before:
        return "a file of the user's was changed"
    if code in (2, 3):
        one = sum(line.startswith("error: ") for line in lines) == 1 and lines[-1].startswith("error: ")
        return "refused" if one else f"no line: {' / '.join(lines[-2:])[:160]}"
    if code != 0:
        return f"exit code {code}"
    if not trained:
        return "right"
    weights = load_file(case / _UNET)
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        return "trained to weights that are no numbers"
    straight = load_file(place / "straight" / _UNET)
    if ours and not all(torch.equal(tensor, straight[name]) for name, tensor in weights.items()):
        return "another model than without the damage"
    return "right"


def digests(case: Path) -> dict[Path, str]:
    """Of everything that is the user's."""
    files = [*case.glob("photos/**/*"), *case.glob("model/**/*"), case / "model.safetensors", case / "run.toml"]
    return {file.relative_to(case): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def command(folder: Path, *words: str) -> tuple[int | None, float]:
    """`lowvram-db WORDS` in a folder, its words in `log` there; the exit code, None after _SECONDS, and the seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lowvram_db.dreambooth", "diffusers.pipelines.stable_diffusion"])
    began = time.monotonic()
    process = context.Process(target=_run, args=(folder, words))
    process.start()
    process.join(_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None, time.monotonic() - began
    return process.exitcode, time.monotonic() - began


def _run(folder: Path, words: tuple[str, ...]) -> None:
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder.parent / "home")  # plans that are asked for again are there
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    gc.freeze()  # what the libraries made is no garbage
    sys.argv = ["lowvram-db", *words]
    from lowvram_db.cli import main

    main()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
