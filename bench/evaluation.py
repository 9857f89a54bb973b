"""Does `evaluate` name the right step on the demo base, and what went wrong where something did?

    python bench/evaluation.py --seeds 5 --runs /tmp/runs [--only "seed 2"] [--only "lr x 3"]

Trains configs/demo.toml for 300 steps with six checkpoints for every seed, and once each without prior preservation, at
higher learning rates and for 30 steps; evaluates them, and appends a row for every checkpoint to
bench/results/evaluation.csv: its scores and findings, whether it is the one recommended, and `truth`, the likeness of
the pictures that were judged to true pictures of the subject that no run has seen, as a share of what those reach among
themselves. Scores by seed, which the rule goes by, are kept in tests/evaluate/judged.json for its tests. Runs that are
there already are not trained again.
"""

import argparse
import json
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
JUDGED = Path(__file__).parents[1] / "tests" / "evaluate" / "judged.json"
LONG = ["train.steps=300", "checkpoint.every=50", "checkpoint.keep=6"]
WAYS = {
    "without prior": [*LONG, "prior.enabled=false"],
    "lr x 3": [*LONG, "train.lr=1.2e-3"],
    "lr x 3 without prior": [*LONG, "train.lr=1.2e-3", "prior.enabled=false"],
    "lr x 10": ["train.steps=60", "checkpoint.every=50", "checkpoint.keep=6", "train.lr=4e-3"],
    "30 steps": ["train.steps=30"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many training seeds")
    parser.add_argument("--runs", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--only", action="append", help="one of the runs; default: all of them")
    given = parser.parse_args()
    ways = {f"seed {seed}": [*LONG, f"train.seed={seed}"] for seed in range(given.seeds)} | WAYS
    for way in given.only or ways:
        changes = ways[way]
        name = way.replace(" ", "-")
        run = run_dreambooth(load(CONFIG, [*changes, f"output.dir={given.runs}", f"output.name={name}"]))
        record(way, run.folder)


def record(way: str, run: Path) -> None:
    """Append a row for every checkpoint of a run, and keep its scores by seed."""
    overrides = ["sample.steps=8"]
    result = evaluate(run, seeds=2, overrides=overrides)
    truths = {one["step"]: truth(run, one["step"], overrides) for one in result["checkpoints"]}
    for one in result["checkpoints"]:
        means = {name: f"{value['mean']:.4f}" for name, value in one["scores"].items()}
        chosen = one["step"] == result["recommended"]["step"]
        row: dict[str, Any] = {"run": way, "step": one["step"], **means, "findings": ", ".join(one["findings"])}
        add_row("evaluation", {**row, "truth": f"{truths[one['step']]:.4f}", "recommended": int(chosen)})
    kept = json.loads(JUDGED.read_text()) if JUDGED.exists() else {}
    kept[way] = {
        "photos_similarity": result["photos_similarity"],
        "base": by_seed(result["base"]),
        "checkpoints": {
            one["step"]: by_seed(one["scores"]) | {"truth": truths[one["step"]]} for one in result["checkpoints"]
        },
    }
    JUDGED.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def by_seed(scores: dict[str, Any]) -> dict[str, list[float]]:
    return {name: value["by_seed"] for name, value in scores.items()}


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
