"""What bench/cache.py does to a store to break it: processes killed in the middle, bits flipped, files cut off."""

import multiprocessing
import random
import shutil
import signal
import unittest.mock
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import add_row
from PIL import Image

from lowvram_db.cache import Cached, Framing, Store, precompute, store
from lowvram_db.demo.miniature import write_pipeline
from lowvram_db.families import open_model
from lowvram_db.quiet import hide_loading_bars, quiet_libraries

CPU = torch.device("cpu")
LATENT = (4, 64, 64)  # of 512 px


def report(what: str, figure: float | str, unit: str, goal: str, detail: str) -> None:
    shown = f"{figure:.4g}" if isinstance(figure, float) else str(figure)
    add_row("cache", {"what": what, "figure": shown, "unit": unit, "goal": goal, "detail": detail})
    print(f"{what}: {shown} {unit} (goal {goal}); {detail}", flush=True)


def write_noise(folder: Path, count: int, size: tuple[int, int], kind: str = "png") -> list[Path]:
    """Photos of which no two are alike: a few coarse random blots each, as big files as photos make."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    for number in range(count):
        blots = Image.fromarray(chance.integers(0, 256, (12, 16, 3), np.uint8))
        blots.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:05d}.{kind}")
    return sorted(folder.iterdir())


def build(
    family: Any, folder: Path, photos: list[Path], resolution: int, prompts: Sequence[str] = ("a ball",)
) -> Cached:
    with Store(folder) as opened:
        return precompute(family, opened, CPU, framing=Framing(resolution), photos=photos, prompts=prompts)


def made_up(folder: Path, count: int) -> list[str]:
    """A store of `count` random latents, as fast as they can be written; returns the keys."""
    keys = [f"{number:064x}" for number in range(count)]
    with Store(folder) as opened:
        for number, key in enumerate(keys):
            opened.put(key, latent(number))
    return keys


def latent(number: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(number)
    return {"mean": torch.randn(LATENT), "logvar": torch.randn(LATENT)}


def kills(place: Path) -> None:
    """A build of 300 photos by a process that is killed at a random instant, 100 times, and then left to finish."""
    write_pipeline(place / "model")
    photos = write_noise(place / "photos", 300, (96, 96))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lowvram_db.cache", "lowvram_db.families", "diffusers.models"])
    chance, log, stored = random.Random(0), place / "log", set[str]()
    instants = twice = builds = 0
    while instants < 100:
        worker = context.Process(target=killed_build, args=(place, photos, log))
        worker.start()
        worker.join(chance.uniform(0.02, 1.5))
        if worker.exitcode is None:
            worker.kill()
            worker.join()
            instants += 1
        assert worker.exitcode in (0, -signal.SIGKILL)
        twice += sum(key in stored for key in encoded(log))
        log.unlink(missing_ok=True)
        stored = stored_keys(place / "cache")
        if len(stored) == len(photos):
            builds += 1
            shutil.rmtree(place / "cache")  # once more from the beginning
            stored = set()
    killed_build(place, photos, log)
    twice += sum(key in stored for key in encoded(log))
    with Store(place / "cache", writable=False) as opened:
        wrong, whole = opened.verify(), opened.report().photos
    detail = f"{len(wrong)} damaged; {twice} encoded again after they were stored; {builds} times from the beginning"
    report(
        "kill -9 at 100 random instants, then finish", f"{whole} of {len(photos)}", "entries verified", "all", detail
    )


def killed_build(place: Path, photos: list[Path], log: Path) -> None:
    """As a run would do it, but shards are written more often, and the key of what was encoded is noted at once."""
    quiet_libraries()
    hide_loading_bars()
    torch.set_num_threads(1)
    store._SHARD_SECONDS = 0.1
    put = Store.put

    def noted(self: Store, key: str, tensors: dict[str, torch.Tensor]) -> None:
        with log.open("a") as file:
            file.write(key + "\n")
        put(self, key, tensors)

    with unittest.mock.patch.object(Store, "put", noted):
        build(open_model(str(place / "model")), place / "cache", photos, 64)


def encoded(log: Path) -> list[str]:
    return [line for line in log.read_text().split("\n") if len(line) == 64] if log.exists() else []


def stored_keys(folder: Path) -> set[str]:
    if not folder.exists():
        return set()
    with Store(folder, writable=False) as opened:
        return {key for key, entry in list(opened._entries.items()) if "mean" in entry.tensors and opened.holds(key)}


def damage(place: Path) -> None:
    """200 flips of one bit and truncations at random places of the shards, one at a time; then 200 of the catalogue."""
    keys = made_up(place / "cache", 200)
    with Store(place / "cache") as opened:
        for file in write_noise(place / "photos", 300, (8, 8)):
            opened.catalogue.file_digest(file)
    truth, chance = {key: latent(number) for number, key in enumerate(keys)}, random.Random(0)
    for what, pattern in (("shards", "*.safetensors"), ("the catalogue", "files.jsonl")):
        detected, served = spoil(place / "cache", pattern, truth, chance)
        report(f"200 flips and truncations of {what}", f"{detected} of 200", "detected", "all", f"{served} served")


def spoil(folder: Path, pattern: str, truth: dict[str, Any], chance: random.Random) -> tuple[int, int]:
    """Of 200 damages: how many `verify` finds, and how many wrong entries are handed out."""
    files = sorted(folder.glob(f"v*/{pattern}"))
    sizes = [file.stat().st_size for file in files]
    detected = served = 0
    for _ in range(200):
        (victim,) = chance.choices(files, sizes)
        content = victim.read_bytes()
        place = chance.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        victim.write_bytes(damaged if chance.random() < 0.5 else content[:place])
        with Store(folder, writable=False) as opened:
            detected += bool(opened.verify())
            for key, wanted in truth.items():
                got = opened.get(key)
                served += got is not None and not all(torch.equal(got[name], wanted[name]) for name in wanted)
        victim.write_bytes(content)
    return detected, served
