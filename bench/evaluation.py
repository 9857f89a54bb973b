"""Does `evaluate` name the right step on the demo base, and what went wrong where something did?

    python bench/evaluation.py --seeds 5 --runs /tmp/runs

Trains configs/demo.toml for 300 steps with six checkpoints for every seed, and once each without prior preservation, at
ten times the learning rate and for 30 steps; evaluates them, and appends a row for every checkpoint to
bench/results/evaluation.csv: its scores and findings, whether it is the one recommended, and `truth`, the likeness of
the pictures that were judged to true pictures of the subject that no run has seen, as a share of what those reach among
themselves. Runs that are there already are not trained again.
"""

import argparse
from pathlib import Path
from typing import Any

from machine import add_row

from lowvram_db.config import load
from lowvram_db.demo.critic import load_critic
from lowvram_db.demo.measure import likeness, likeness_among, subject_pixels
from lowvram_db.demo.subjects import SUBJECT
from lowvram_db.demo.world import SETTINGS
from lowvram_db.dreambooth import run_dreambooth
from lowvram_db.evaluate.evaluation import evaluate, planned
from lowvram_db.evaluate.networks import small
from lowvram_db.evaluate.pictures import load as load_pictures

CONFIG = Path(__file__).parents[1] / "configs" / "demo.toml"
LONG = ["train.steps=300", "checkpoint.every=50", "checkpoint.keep=6"]
WAYS = {
    "without prior": [*LONG, "prior.enabled=false"],
    "lr x 10": ["train.steps=60", "checkpoint.every=50", "checkpoint.keep=6", "train.lr=4e-3"],
    "30 steps": ["train.steps=30"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many training seeds")
    parser.add_argument("--runs", type=Path, required=True, help="the folder of the runs")
    given = parser.parse_args()
    ways = {f"seed {seed}": [*LONG, f"train.seed={seed}"] for seed in range(given.seeds)} | WAYS
    for way, changes in ways.items():
        name = way.replace(" ", "-")
        run = run_dreambooth(load(CONFIG, [*changes, f"output.dir={given.runs}", f"output.name={name}"]))
        record(way, run.folder)


def record(way: str, run: Path) -> None:
    """Append a row for every checkpoint of a run."""
    overrides = ["sample.steps=8"]
    result = evaluate(run, seeds=2, overrides=overrides)
    for one in result["checkpoints"]:
        means = {name: f"{value['mean']:.4f}" for name, value in one["scores"].items()}
        chosen = one["step"] == result["recommended"]["step"]
        row: dict[str, Any] = {"run": way, "step": one["step"], **means, "findings": ", ".join(one["findings"])}
        add_row("evaluation", {**row, "truth": f"{truth(run, one['step'], overrides):.4f}", "recommended": int(chosen)})


def truth(folder: Path, step: int, overrides: list[str]) -> float:
    run, plan = planned(folder, seeds=2, overrides=overrides)
    model = next(one for one in plan.candidates if one.step == step)
    subject, _ = plan.wanted
    pictures = load_pictures(
        [model.picture(one, plan.how, run.folder / "evaluation") for row in subject for one in row]
    )
    critic, held_out = load_critic(), subject_pixels(SUBJECT, SETTINGS, 4, seed=1)
    return likeness(critic, small(pictures), held_out).mean().item() / likeness_among(critic, held_out)


if __name__ == "__main__":
    main()
