"""What does it cost to look at a model while it trains?

    python bench/on_the_way.py

The demo's model and its subject, as a run of 800 steps. In turn: training steps, one validation, the sample grid of the
model in training, and the same pictures by diffusers' pipeline with the same weights; medians over rounds. Appends a
row a figure to bench/results/on_the_way.csv. The shares are of the time of a run's 800 steps: of its validations at the
default interval as they were timed, and by the passes through the denoiser that they make.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from machine import add_row
from usage import settle

from lowvram_db.cache import Store
from lowvram_db.concept import describe, subject_photos
from lowvram_db.config import Config, load
from lowvram_db.encoding import encode_all
from lowvram_db.families import open_model
from lowvram_db.memory.device import pick_device
from lowvram_db.results import sample_base, sample_trainer
from lowvram_db.run import Run
from lowvram_db.train.batches import Batches
from lowvram_db.train.trainer import Trainer
from lowvram_db.train.validation import Validation

CONFIG = Path(__file__).parents[1] / "configs" / "demo.toml"
STEPS = 10  # a round
FORWARD_PASSES = 3  # that a training step is worth, for every row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "cache") as store:
        changes = ["train.steps=800", "sample.every=400", f"output.dir={folder}"]
        config = load(CONFIG, changes)
        trainer, run = trainer_of(config, store), Run.of(config)
        sample_base(config, run, trainer.family, trainer.device, config.sample.seeds, lambda stage: None)
        validation, pipeline = Validation(trainer, {}), Pipeline(trainer)
        works: dict[str, Callable[[], object]] = {
            "step": lambda: [trainer.train_step().read() for _ in range(STEPS)],
            "validation": validation.measure,
            "pipeline's pictures": pipeline.draw,
            "sample grid": lambda: sample_trainer(trainer, run, config.sample.seeds, run.sample_grid(1)),
        }
        taken: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(given.rounds):
            for name, work in works.items():
                taken[name].append(seconds(work, trainer.device))
        counted = rows(validation, trainer)
    middle = {name: median(all_) for name, all_ in taken.items()}
    middle["step"] /= STEPS
    times = sum(validation.due(step) for step in range(config.train.steps + 1))
    figures = {f"{name}, s": value for name, value in middle.items()} | {
        "validations": times,
        "validations' share of the time, %": 100 * times * middle["validation"] / (config.train.steps * middle["step"]),
        "validations' share of the passes, %": 100 * times * counted / passes(trainer),
        "sample grid beside the pipeline, %": 100 * (middle["sample grid"] / middle["pipeline's pictures"] - 1),
    }
    for name, value in figures.items():
        add_row("on_the_way", {"figure": name, "value": f"{value:.4g}", "rounds": given.rounds})
        print(f"{name}: {value:.4g}", flush=True)


def trainer_of(config: Config, store: Store) -> Trainer:
    """At step 0; photos stand in for class images, which takes the same time."""
    family, device = open_model(config.model.name), pick_device()
    photos = subject_photos(config)
    concept = describe(config, photos, photos[::-1])
    cached = encode_all(config, family, store, concept, device)
    return Trainer(config, family, Batches(concept, cached, config.train.batch, config.train.seed), device)


class Pipeline:
    """diffusers' own, with a trainer's weights, held in the precision that it trains in."""

    def __init__(self, trainer: Trainer):
        self._config = trainer.config
        self._pipeline = trainer.family.pipeline(trainer.dtype, unet=trainer.denoiser).to(trainer.device)
        self._pipeline.set_progress_bar_config(disable=True)

    def draw(self) -> None:
        sample = self._config.sample
        for prompt in sample.prompts:
            self._pipeline(
                self._config.fill(prompt),
                guidance_scale=sample.guidance[0],
                num_images_per_prompt=sample.seeds,
                num_inference_steps=sample.steps,
                height=self._config.train.resolution,
                width=self._config.train.resolution,
                generator=[torch.Generator().manual_seed(seed) for seed in range(sample.seeds)],
            )


def rows(validation: Validation, trainer: Trainer) -> int:
    """That one validation sends through the denoiser."""
    counted: list[int] = []
    hook = trainer.denoiser.register_forward_pre_hook(lambda network, inputs: counted.append(len(inputs[0])))
    validation.measure()
    hook.remove()
    return sum(counted)


def passes(trainer: Trainer) -> int:
    """What the steps of a run are worth in rows sent through the denoiser."""
    train = trainer.config.train
    return FORWARD_PASSES * 2 * train.batch * train.accumulate * train.steps


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """On a CPU the processor's own, for other work may run beside it."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    settle(device)
    began = clock()
    work()
    settle(device)
    return clock() - began


if __name__ == "__main__":
    main()
