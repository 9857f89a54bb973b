"""What the precompute cache costs, and what it holds out: one row a claim in bench/results/cache.csv.

    python bench/cache.py                    all of it, about a quarter of an hour on two cores
    python bench/cache.py overhead reading   some of it

Latents are those of 512 px, 4 x 64 x 64, where nothing else is said.
"""

import argparse
import contextlib
import multiprocessing
import random
import shutil
import signal
import statistics
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from full_size import SD15_TEXT, SD15_VAE
from machine import add_row
from PIL import Image

from lowvram_db.cache import Cached, Frame, Framing, Store, View, catalogue, precompute, store
from lowvram_db.cache.framing import to_float
from lowvram_db.concept import Concept
from lowvram_db.demo.miniature import MINIATURE_UNET, write_pipeline
from lowvram_db.families import open_model
from lowvram_db.families.base import Family
from lowvram_db.photos import load_photo
from lowvram_db.quiet import hide_loading_bars, quiet_libraries
from lowvram_db.train.batches import Batches

CPU = torch.device("cpu")
LATENT = (4, 64, 64)


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


class Watched:
    """A family that counts what goes through its VAE, and can be given one that is in memory already."""

    def __init__(self, family: Family, vae: Any = None):
        self._family, self._vae, self.images = family, vae, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def load_vae(self, dtype: torch.dtype) -> Any:
        return self._vae or self._family.load_vae(dtype)

    def encode_images(self, vae: Any, pixels: torch.Tensor) -> Any:
        self.images += len(pixels)
        return self._family.encode_images(vae, pixels)


def build(
    family: Any, folder: Path, photos: list[Path], resolution: int, prompts: Sequence[str] = ("a ball",)
) -> Cached:
    with Store(folder) as opened:
        return precompute(family, opened, CPU, framing=Framing(resolution), photos=photos, prompts=prompts)


def overhead(place: Path) -> None:
    """Against a loop that decodes nothing, hashes nothing and keeps nothing: ready pixels through a loaded VAE."""
    write_pipeline(place / "model", unet=MINIATURE_UNET | {"cross_attention_dim": 768}, vae=SD15_VAE, text=SD15_TEXT)
    family = open_model(str(place / "model"))
    vae = family.load_vae()
    store.Catalogue(place / "nothing").file_digest(family.vae_files[-1])  # into the page cache
    for resolution, size, count in ((256, (640, 480), 12), (512, (4000, 3000), 6)):
        photos = write_noise(place / f"photos-{resolution}", count, size, "jpg")
        pixels = [View.of(size, (resolution, resolution)).pixels(load_photo(photo)) for photo in photos]
        bare, whole = [], []
        for repetition in range(3):
            began = time.perf_counter()
            with torch.no_grad():
                for image in pixels:
                    family.encode_images(vae, to_float(image[None]))
            bare.append(time.perf_counter() - began)
            folder, watched = place / f"cache-{resolution}-{repetition}", Watched(family, vae)
            began = time.perf_counter()
            build(watched, folder, photos, resolution, prompts=[])
            whole.append(time.perf_counter() - began)
            assert watched.images == count
        ratios = [there / here for there, here in zip(whole, bare, strict=True)]
        detail = (
            f"SD 1.5's VAE (loaded), fp32, batch 1, {count} JPEGs of {size[0]}x{size[1]}; median of 3 "
            f"({', '.join(f'{100 * (ratio - 1):.1f}' for ratio in ratios)}); bare {min(bare) / count:.2f} s a photo"
        )
        report(f"precompute overhead, {resolution} px", 100 * (statistics.median(ratios) - 1), "%", "<= 5 %", detail)


def second_start(place: Path) -> None:
    """1,000 unchanged photos whose latents are those of 512 px; then one of them edited."""
    family, photos = flat_family(place), write_noise(place / "photos", 1000, (640, 480))
    build(family, place / "cache", photos, 512)
    time.sleep(2.1)  # until files' times can be trusted, as the catalogue sees it
    build(family, place / "cache", photos, 512)  # reads them once more, for that
    seconds = []
    with counting_decodes() as decoded:
        for _ in range(5):
            began = time.perf_counter()
            build(family, place / "cache", photos, 512)
            seconds.append(time.perf_counter() - began)
    size = Store(place / "cache", writable=False).report().size / 2**20
    detail = f"{len(decoded)} photos decoded; all {size:.0f} MiB compared with their checksums; median of 5"
    report("second start, 1,000 unchanged photos", statistics.median(seconds), "s", "<= 1 s", detail)
    for photo in photos:
        photo.touch()
    with counting_decodes() as decoded:
        began = time.perf_counter()
        build(family, place / "cache", photos, 512)
        taken = time.perf_counter() - began
    report("start, 1,000 photos touched but not changed", taken, "s", "none named", f"{len(decoded)} photos decoded")
    Image.open(photos[500]).rotate(180).save(photos[500])
    watched = Watched(family)
    build(watched, place / "cache", photos, 512)
    report("one photo of 1,000 edited", watched.images, "encodes", "1", "the VAE's calls were counted")


def flat_family(place: Path) -> Family:
    """A model whose VAE is a few layers deep but makes latents of the usual shape: 1,000 of them in a minute."""
    vae = SD15_VAE | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 8, "layers_per_block": 1}
    write_pipeline(place / "model", vae=vae)
    return open_model(str(place / "model"))


@contextlib.contextmanager
def counting_decodes() -> Iterator[list[Path]]:
    """The photos that are decoded while it lasts."""
    decoded: list[Path] = []
    decode = catalogue.decode_photo

    def counted(content: bytes, path: Path) -> Image.Image:
        decoded.append(path)
        return decode(content, path)

    catalogue.decode_photo = counted
    try:
        yield decoded
    finally:
        catalogue.decode_photo = decode


def made_up(folder: Path, count: int) -> list[str]:
    """A store of `count` random latents, as fast as they can be written; returns the keys."""
    keys = [f"{number:064x}" for number in range(count)]
    with Store(folder) as opened:
        for number, key in enumerate(keys):
            torch.manual_seed(number)
            opened.put(key, {"mean": torch.randn(LATENT), "logvar": torch.randn(LATENT)})
        opened.put("f" * 64, {"conditioning": torch.randn(77, 768)})
    return keys


def reading(place: Path) -> None:
    """Batches of 4 read at random, twice over; memory is the process's resident set after as many batches each."""
    process, grown = psutil.Process(), {}
    for count in (100, 1000, 10_000):
        keys, chance = made_up(place / str(count), count), random.Random(0)
        with Store(place / str(count)) as opened:
            for key in keys:
                opened.holds(key)
            opened.stack(keys[:4])
            base = process.memory_info().rss
            rates = []
            for _ in range(5):
                asked = [[chance.choice(keys) for _ in range(4)] for _ in range(2000)]
                began = time.perf_counter()
                for batch in asked:
                    opened.stack(batch)
                rates.append(2000 / (time.perf_counter() - began))
            grown[count] = (process.memory_info().rss - base) / 2**20
            chosen_rate = sampler(opened, keys)
        report(f"reading batches of 4, {count} entries", statistics.median(rates), "batches/s", ">= 5000",
               "mean and log-variance, stacked on the CPU, page cache warm; median of 5 times 2,000")  # fmt: skip
        report(f"reading through the sampler, {count} entries", chosen_rate, "batches/s", "none named",
               "train.batch = 4, one prompt, one variant")  # fmt: skip
        report(f"resident memory that reading adds, {count} entries", grown[count], "MiB", "flat",
               f"10,000 batches of {count * 128 / 1024:.0f} MiB of entries")  # fmt: skip
        before = process.memory_info().rss
        with Store(place / str(count)) as opened:
            report(f"resident memory of an open store, {count} entries", (process.memory_info().rss - before) / 2**20,
                   "MiB", "flat", "the index: keys, places and checksums")  # fmt: skip
        shutil.rmtree(place / str(count))


def sampler(opened: Store, keys: list[str]) -> float:
    """Batches a second through the training's own sampler, which chooses by (seed, step) what is read."""
    frames = {Path(key): Frame((512, 512), [key]) for key in keys}
    concept = Concept(list(frames), ["a ball"], [], "")
    batches = Batches(concept, Cached(opened, frames, {}, {}), 4, seed=0)
    began = time.perf_counter()
    for step in range(2000):
        batches[step]
    return 2000 / (time.perf_counter() - began)


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
    report("kill -9 at 100 random instants, then finish", f"{whole} of {len(photos)}", "entries verified", "all",
           f"{len(wrong)} damaged; {twice} encoded again after they were stored; {builds} times from the beginning")  # fmt: skip


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
    truth = {key: latent(number) for number, key in enumerate(keys)}
    chance = random.Random(0)
    shards = sorted((place / "cache").glob("v*/*.safetensors"))
    detected, served = spoil(place / "cache", shards, truth, chance)
    report("200 flips and truncations of shards", f"{detected} of 200", "detected", "all", f"{served} served")
    detected, served = spoil(place / "cache", list((place / "cache").glob("v*/*.sqlite")), truth, chance)
    report("200 flips and truncations of the catalogue", f"{detected} of 200", "detected", "none named",
           f"{served} served; what is not detected lies in bytes that SQLite does not use")  # fmt: skip


def latent(number: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(number)
    return {"mean": torch.randn(LATENT), "logvar": torch.randn(LATENT)}


def spoil(folder: Path, files: list[Path], truth: dict[str, Any], chance: random.Random) -> tuple[int, int]:
    """How many of 200 damages `verify` finds, and how many entries then come out other than they were put in."""
    detected = served = 0
    sizes = [file.stat().st_size for file in files]
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


PARTS: dict[str, Callable[[Path], None]] = {
    "overhead": overhead, "second-start": second_start, "reading": reading, "kills": kills, "damage": damage,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parts = parser.parse_args().parts or list(PARTS)
    quiet_libraries()
    hide_loading_bars()
    torch.set_num_threads(1)
    for part in parts:
        with tempfile.TemporaryDirectory() as place:
            PARTS[part](Path(place))


if __name__ == "__main__":
    main()
