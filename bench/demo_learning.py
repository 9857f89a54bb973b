"""What DreamBooth does to the miniature base model, in numbers.

    python bench/demo_learning.py --seeds 1

Trains configs/demo.toml (changed by --set) with and without prior preservation, and appends what the critic makes of
the base model and of both results to bench/results/demo_learning.csv, a row a figure. Likenesses are shares of what
held-out true pictures of the subject reach among themselves.
"""

import argparse
import dataclasses
import tempfile
from itertools import product
from pathlib import Path

from diffusers import StableDiffusionPipeline
from machine import add_row

from lowvram_db.config import load
from lowvram_db.demo.critic import load_critic
from lowvram_db.demo.measure import learned
from lowvram_db.demo.subjects import SUBJECT
from lowvram_db.dreambooth import run_dreambooth

CONFIG = Path(__file__).parents[1] / "configs" / "demo.toml"
NO_GRIDS = ["sample.seeds=1", "sample.steps=1"]  # they teach nothing, and measure() draws its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many training seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--prior-only", action="store_true", help="train only with prior preservation")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="as lowvram-db train --set")
    given = parser.parse_args()
    measure("base", load(CONFIG).model.name, 0, given.overrides)
    ways = {"with prior": "true"} if given.prior_only else {"with prior": "true", "without prior": "false"}
    with tempfile.TemporaryDirectory() as folder:  # one, for the class images are the same
        for seed, (name, enabled) in product(range(given.first, given.first + given.seeds), ways.items()):
            changes = [f"prior.enabled={enabled}", f"train.seed={seed}", f"output.dir={folder}"]
            changes.append(f"output.name={name.replace(' ', '-')}-{seed}")
            run = run_dreambooth(load(CONFIG, [*NO_GRIDS, *changes, *given.overrides]))
            measure(name, str(run.model), seed, given.overrides)


def measure(name: str, model: str, seed: int, overrides: list[str]) -> None:
    """Append a row for each figure of one model."""
    config = load(CONFIG, overrides)
    for metric, value in figures(model, config.fill(config.subject.plain_template)).items():
        row = {"model": name, "seed": seed, "overrides": " ".join(overrides), "metric": metric, "value": f"{value:.4f}"}
        add_row("demo_learning", row)
        print(f"{name}, seed {seed}: {metric} {value:.3f}", flush=True)


def figures(model: str, instance: str) -> dict[str, float]:
    """What the critic makes of a model that was to learn the subject under the prompt `instance`."""
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return dataclasses.asdict(learned(pipeline, load_critic(), SUBJECT, instance, each=8))


if __name__ == "__main__":
    main()
