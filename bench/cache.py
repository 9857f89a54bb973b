"""What the precompute cache costs, and what it holds out: one row a claim in bench/results/cache.csv.

    python bench/cache.py                    all of it, about a quarter of an hour on two cores
    python bench/cache.py overhead reading   some of it

Latents are those of 512 px, 4 x 64 x 64, where nothing else is said.
"""

import argparse
import contextlib
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from cache_damage import build, damage, kills, made_up, report, write_noise
from PIL import Image

from lowvram_db.cache import Cached, Frame, Store, View, catalogue
from lowvram_db.concept import Concept
from lowvram_db.demo.miniature import write_pipeline
from lowvram_db.families import open_model
from lowvram_db.families.base import Family
from lowvram_db.formats.known import known_config
from lowvram_db.framing import to_float
from lowvram_db.memory.device import release_memory
from lowvram_db.photos import load_photo
from lowvram_db.quiet import hide_loading_bars, quiet_libraries
from lowvram_db.train.batches import Batches


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


def overhead(place: Path) -> None:
    """Against a loop that decodes nothing, hashes nothing and keeps nothing: ready pixels through a loaded VAE.

    In processor time of all threads: on a shared machine the clock says more of the neighbours, and what other threads
    decode is then counted too, though on a free core it costs no time."""
    write_pipeline(place / "model", vae=sd15_vae())
    family = open_model(str(place / "model"))
    vae = family.load_vae()
    for resolution, size, count in ((256, (640, 480), 6), (512, (4000, 3000), 3)):
        photos = write_noise(place / f"photos-{resolution}", count, size, "jpg")
        pixels = [View.of(size, (resolution, resolution)).pixels(load_photo(photo)) for photo in photos]
        bare, whole = [], []
        for repetition in range(3):
            began = time.process_time()
            with torch.no_grad():
                for image in pixels:
                    family.encode_images(vae, to_float(image[None]))
            bare.append(time.process_time() - began)
            folder, watched = place / f"cache-{resolution}-{repetition}", Watched(family, vae)
            began = time.process_time()
            build(watched, folder, photos, resolution, prompts=[])
            whole.append(time.process_time() - began)
            assert watched.images == count
        ratios = [there / here for there, here in zip(whole, bare, strict=True)]
        detail = (
            f"processor time; SD 1.5's VAE (loaded), fp32, batch 1, {count} JPEGs of {size[0]}x{size[1]}; median of 3 "
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


def sd15_vae() -> dict[str, Any]:
    return known_config("stable-diffusion-v1-5/stable-diffusion-v1-5", "vae")


def flat_family(place: Path) -> Family:
    """A model whose VAE is a few layers deep but makes latents of the usual shape: 1,000 of them in a minute."""
    vae = sd15_vae() | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 8, "layers_per_block": 1}
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


def reading(place: Path) -> None:
    """Batches of 4 read at random, in processor time, as for overhead; and what of it stays in the resident set."""
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
                began = time.process_time()
                for batch in asked:
                    opened.stack(batch)
                rates.append(2000 / (time.process_time() - began))
            grown[count] = (process.memory_info().rss - base) / 2**20
            chosen_rate = sampler(opened, keys)
        report(f"reading batches of 4, {count} entries", statistics.median(rates), "batches/s", ">= 5000",
               "processor time; mean and log-variance, stacked; page cache warm; median of 5 times 2,000")  # fmt: skip
        report(f"reading through the sampler, {count} entries", chosen_rate, "batches/s", "none named",
               "processor time; train.batch = 4, one prompt, one variant")  # fmt: skip
        report(f"resident memory that reading adds, {count} entries", grown[count], "MiB", "flat",
               f"10,000 batches of {count * 128 / 1024:.0f} MiB of entries")  # fmt: skip
        release_memory()  # else the store finds room in what the one before has left
        before = process.memory_info().rss
        with Store(place / str(count)) as opened:
            report(f"resident memory of an open store, {count} entries", (process.memory_info().rss - before) / 2**20,
                   "MiB", "flat", "the index: keys, places and checksums")  # fmt: skip
        shutil.rmtree(place / str(count))


def sampler(opened: Store, keys: list[str]) -> float:
    """Batches a second through the training's own sampler, which chooses by (seed, step) what is read."""
    view = View.of((512, 512), (512, 512))
    frames = {Path(key): Frame(key, [view], [key]) for key in keys}
    concept = Concept(list(frames), ["a ball"], [], "")
    batches = Batches(concept, Cached(opened, frames, {}, {}), 4, seed=0)
    began = time.process_time()
    for step in range(2000):
        batches[step]
    return 2000 / (time.process_time() - began)


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
