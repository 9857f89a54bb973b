"""The rendered training stream on disk: pictures are drawn once, then read by every stage."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from lowvram_db.atomic import replacing_file
from lowvram_db.demo.looks import HELD_OUT_ADORNMENT, HELD_OUT_PATTERN
from lowvram_db.demo.names import random_look
from lowvram_db.demo.world import NOUNS, SETTINGS, Scene, compose, is_held_out, render, training_scene

CHUNK = 500
HELD_OUT_FROM = 10_000_000  # seeds from here on are for measuring
VIEWS = 4  # pictures of each look in the critic's set


def critic_scene(index: int) -> Scene:
    """Scene `index` of the critic's own set: VIEWS scenes in a row show the same look, some with held-out features."""
    rng = Random(f"critic look {index // VIEWS}")
    noun, look = rng.choice(NOUNS), random_look(rng, rich=True)
    if rng.random() < 0.25:
        changed = {**look.__dict__, "pattern": HELD_OUT_PATTERN}
        look = type(look)(**(changed if rng.random() < 0.5 else {**look.__dict__, "adornment": HELD_OUT_ADORNMENT}))
    view = Random(f"critic view {index}")
    return compose(noun, view.choice(SETTINGS), view.getrandbits(32), look)


def held_out_scene(index: int) -> Scene:
    """Scene `index` for measuring: a fresh picture of anything but held-out combinations."""
    return training_scene(HELD_OUT_FROM + index)


def unseen_combination(index: int) -> Scene:
    """Scene `index` of a combination of class, colour and setting that the stream never shows."""
    rng = Random(f"unseen {index}")
    while True:
        scene = compose(rng.choice(NOUNS), rng.choice(SETTINGS), rng.getrandbits(32))
        if is_held_out(scene.noun, scene.look.colour, scene.setting):
            return scene


SOURCES = {"stream": training_scene, "critic": critic_scene, "held-out": held_out_scene}


def _chunk(job: tuple[str, int, int]) -> np.ndarray:
    source, start, stop = job
    return np.stack([np.asarray(render(SOURCES[source](i))) for i in range(start, stop)])


def pictures(source: str, count: int, folder: Path) -> np.ndarray:
    """The first `count` pictures of a source, uint8 (count, 64, 64, 3), memory-mapped; rendered if not there yet."""
    path = folder / f"{source}-{count}.npy"
    if not path.exists():
        jobs = [(source, i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]
        with replacing_file(path) as temporary, multiprocessing.Pool(os.cpu_count()) as pool:
            store = np.lib.format.open_memmap(temporary, "w+", np.uint8, (count, 64, 64, 3))
            for (_, start, stop), done in zip(jobs, pool.imap(_chunk, jobs), strict=True):
                store[start:stop] = done
            store.flush()
    loaded: np.ndarray = np.load(path, mmap_mode="r")
    return loaded


def to_pixels(batch: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, 64, 64, 3) to float32 (B, 3, 64, 64) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(batch)).to(device).permute(0, 3, 1, 2)
    return pixels.float().contiguous() / 127.5 - 1.0
