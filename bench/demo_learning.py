"""What DreamBooth does to the miniature base model, in numbers.

    python bench/demo_learning.py --seeds 1

Trains configs/demo.toml (changed by --set) with and without prior preservation, and appends what the critic makes of
the base model and of both results to bench/results/demo_learning.csv, a row a figure. Likenesses are shares of what
held-out true pictures of the subject reach among themselves.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from diffusers import StableDiffusionPipeline
from machine import add_row

from lowvram_db.config import load
from lowvram_db.demo.critic import load_critic
from lowvram_db.demo.measure import learned
from lowvram_db.demo.showcase import SUBJECT
from lowvram_db.dreambooth import run_dreambooth

CONFIG = Path(__file__).parents[1] / "configs" / "demo.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many training seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--prior-only", action="store_true", help="train only with prior preservation")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="as lowvram-db train --set")
    given = parser.parse_args()
    measure("base", load(CONFIG).model.name, 0, given.overrides)
    ways = {"with prior": "true"} if given.prior_only else {"with prior": "true", "without prior": "false"}
    for seed in range(given.first, given.first + given.seeds):
        for name, enabled in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                changes = [f"prior.enabled={enabled}", f"train.seed={seed}", f"output.dir={folder}"]
                run = run_dreambooth(load(CONFIG, [*changes, *given.overrides]))
                measure(name, str(run.model), seed, given.overrides)


def measure(name: str, model: str, seed: int, overrides: list[str]) -> None:
    """Append a row for each figure of one model."""
    for metric, value in figures(model, overrides).items():
        row = {"model": name, "seed": seed, "overrides": " ".join(overrides), "metric": metric, "value": f"{value:.4f}"}
        add_row("demo_learning", row)
        print(f"{name}, seed {seed}: {metric} {value:.3f}", flush=True)


def figures(model: str, overrides: list[str]) -> dict[str, float]:
    """What the critic makes of a model's folder."""
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    config = load(CONFIG, overrides)
    found = learned(pipeline, load_critic(), SUBJECT, config.fill(config.subject.plain_template), each=8)
    return dataclasses.asdict(found)


if __name__ == "__main__":
    main()
