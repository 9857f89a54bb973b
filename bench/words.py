"""What the words and the pictures of a subject do to what is learned, on the miniature base model.

    python bench/words.py --seed 0

Trains configs/demo.toml in every way of WAYS (or those that are named) with one seed, and appends a row a run to
bench/results/words.csv as it ends: the figures of bench/demo_learning.py, whose prompts say the subject's word as the
plain instance prompt does, however it was trained. `base` is the model before training, asked by the same word.
`--table` writes the table of docs/recipes.md, of the rows that there are.
"""

import argparse
import csv
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean

from demo_learning import CONFIG, figures
from machine import RESULTS, add_row
from PIL import Image, ImageChops

from lowvram_db.config import load
from lowvram_db.demo.backdrops import BACKDROPS
from lowvram_db.demo.looks import Look
from lowvram_db.demo.names import individuals
from lowvram_db.demo.pen import CANVAS, SUPERSAMPLE
from lowvram_db.demo.photos import photo_scenes, write_photos
from lowvram_db.demo.subjects import SUBJECT
from lowvram_db.demo.world import Pose, Scene, place
from lowvram_db.dreambooth import run_dreambooth

# Photos of one home have the same things about: as many as leave the subject to be seen, at its sides.
CLUTTER = (
    Scene("mug", "", Look("red", "dotted", "white"), Pose(0.14, 0.3, 0.15), 0),
    Scene("umbrella", "", Look("green", "two-tone", "yellow"), Pose(0.87, 0.26, 0.16), 0),
    Scene("car", "", Look("blue", "banded", "orange"), Pose(0.83, 0.82, 0.17), 0),
    Scene("flower", "", Look("pink", "plain"), Pose(0.15, 0.8, 0.15), 0),
)
SHIFT = 0.05  # of the picture's side, by which they move from photo to photo
QUICK = ["sample.seeds=1", "sample.steps=1"]  # nobody looks at the pictures of these runs
FIGURES = ("own", "elsewhere", "setting_right", "mistaken", "diversity")
INSTANCE = "a photo of a {word} jellyfish"


def captioned(folder: Path) -> None:
    """The photos, with captions that say where they were taken."""
    write_photos(SUBJECT, folder)
    for number, scene in enumerate(photo_scenes(SUBJECT), 1):
        caption = f"a photo of a {{identifier}} {{class}} {scene.setting}"
        (folder / f"photo-{number}.txt").write_text(caption, encoding="utf-8")


def cluttered(folder: Path, masks: bool) -> None:
    """The photos with other things around the subject, and masks of it."""
    folder.mkdir(parents=True)
    for number, scene in enumerate(photo_scenes(SUBJECT), 1):
        canvas, rng = BACKDROPS[scene.setting](Random(scene.seed)), Random(number)
        for thing in CLUTTER:
            x, y = (at + rng.uniform(-SHIFT, SHIFT) for at in (thing.pose.x, thing.pose.y))
            place(replace(thing, setting=scene.setting, pose=replace(thing.pose, x=x, y=y)), canvas)
        place(scene, canvas)
        canvas.reduce(SUPERSAMPLE).save(folder / f"photo-{number}.png")
        if masks:
            mask_of(scene).save(folder / f"photo-{number}.mask.png")


def mask_of(scene: Scene) -> Image.Image:
    """White where the subject hides what is behind it."""
    on_black, on_white = (Image.new("RGB", (CANVAS, CANVAS), ground) for ground in ("black", "white"))
    for canvas in (on_black, on_white):
        place(scene, canvas)
    return ImageChops.invert(ImageChops.difference(on_black, on_white).convert("L")).reduce(SUPERSAMPLE)


# By name: settings, and what makes the photos where they are others than the demo's.
WAYS = {
    "plain": ([], None),
    "set": (['subject.prompts="living"'], None),
    "captions": ([], captioned),
    "named": ([], None),  # by a word that the base model has a jellyfish for, with each seed another one
    "clutter": ([], partial(cluttered, masks=False)),
    "clutter, masks": ([], partial(cluttered, masks=True)),
    "bare word": (['subject.prompts=["{identifier}"]'], None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the training seed")
    parser.add_argument("--table", action="store_true", help="train nothing; print the means of the rows")
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)}; default: all of them")
    given = parser.parse_args()
    if given.table:
        print(table())
        return
    with tempfile.TemporaryDirectory() as folder:
        for way in given.ways or WAYS:
            run(way, given.seed, Path(folder))


def run(way: str, seed: int, folder: Path) -> None:
    """Train in one way, and append its row; where its word is the base model's own, also that model's."""
    changes, write = WAYS[way]
    word = individuals(SUBJECT.noun)[seed].name if way == "named" else load(CONFIG).subject.identifier
    own = [f"subject.identifier={word}", f"train.seed={seed}", f"output.dir={folder}", f"output.name={way}"]
    if write:
        photos = folder / f"photos of {way}"
        write(photos)
        own.append(f"subject.photos={photos}")
    config = load(CONFIG, [*QUICK, *own, *changes])
    models = {way: str(run_dreambooth(config).model)}
    if way in ("plain", "named"):
        models[f"base, {way}"] = config.model.name
    for name, model in models.items():
        found = figures(model, INSTANCE.format(word=word))
        row = {metric: f"{value:.4f}" for metric, value in found.items()}
        add_row("words", {"way": name, "seed": seed, "word": word, **row})
        print(name, seed, word, row, flush=True)


def table() -> str:
    """The mean of every way over the seeds that all ways have rows of, in Markdown."""
    with (RESULTS / "words.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ways = {way: [row for row in rows if row["way"] == way] for way in dict.fromkeys(row["way"] for row in rows)}
    seeds = set.intersection(*({row["seed"] for row in same} for same in ways.values()))
    lines = ["| | seeds | likeness | elsewhere | in that setting | class that passes | distance |", "| --- " * 7 + "|"]
    for way, all_seeds in ways.items():
        same = [row for row in all_seeds if row["seed"] in seeds]
        means = [fmean(float(row[figure]) for row in same) for figure in FIGURES]
        shares = [f"{mean:.0%}" for mean in means[:-1]]
        lines.append(f"| {' | '.join([way, str(len(same)), *shares, f'{means[-1]:.2f}'])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
