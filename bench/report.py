"""How long does a report take, and how large is it? `python bench/report.py`

Of a made-up run of 800 steps with 8 grids at 512 px, four prompts by four seeds each, pictures as rough as photos are
(amplitudes fall with frequency) and as rough as noise. Appends a row each to bench/results/report.csv; seconds are the
median of several reports by the same process, the first apart, as a run's first one has it.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from machine import add_row
from PIL import Image

from lowvram_db.config import load
from lowvram_db.report import write_report
from lowvram_db.run import Run
from lowvram_db.sheet import Grid, save_sheet

CONFIG = Path(__file__).parents[1] / "configs" / "demo.toml"
STEPS, GRIDS, SIDE, SEEDS = 800, 8, 512, 4
STEEPNESS = {"like photos": 1.0, "noise": 0.0}  # amplitudes fall with this power of the frequency


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    for name, steepness in STEEPNESS.items():
        with tempfile.TemporaryDirectory() as folder:
            run = made_up(Path(folder), steepness)
            wall, process = (list(of) for of in zip(*(seconds(run) for _ in range(1 + given.rounds)), strict=True))
            row = {"pictures": name, "steps": STEPS, "grids": GRIDS, "pixels": SIDE}
            row |= {"first_seconds": f"{wall[0]:.2f}", "seconds": f"{median(wall[1:]):.2f}"}
            row["processor_seconds"] = f"{median(process[1:]):.2f}"
            add_row("report", {**row, "megabytes": f"{run.report.stat().st_size / 1e6:.2f}"})
            print(row, f"{run.report.stat().st_size / 1e6:.2f} MB", flush=True)


def seconds(run: Run) -> tuple[float, float]:
    """On the clock, and of the processor, which tells more where other work runs beside it."""
    began = time.perf_counter(), time.process_time()
    write_report(run.folder)
    return time.perf_counter() - began[0], time.process_time() - began[1]


def made_up(folder: Path, steepness: float) -> Run:
    """A run as it is left on the disk, but for its networks."""
    config = load(CONFIG, [f"train.steps={STEPS}", f"train.resolution={SIDE}", f"output.dir={folder}"])
    run, sample = Run.of(config), config.sample
    for place in (run.samples, run.model, run.checkpoint(STEPS)):
        place.mkdir(parents=True)
    run.save_config(config)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in journal()), encoding="utf-8")
    generator = np.random.default_rng(0)
    prompts = [config.fill(prompt) for prompt in sample.prompts]
    grids = [
        Grid(
            prompts,
            sample.guidance,
            SEEDS,
            sample.steps,
            [[picture(generator, steepness) for _ in range(SEEDS)] for _ in prompts],
        )
        for _ in range(GRIDS)
    ]
    for number, grid in enumerate(grids):
        save_sheet(
            run.sample_grid(number * STEPS // (GRIDS - 1)),
            {"base model": grids[0]} | ({f"step {number}": grid} if number else {}),
        )
    return run


def journal() -> list[dict[str, float]]:
    """What metrics.jsonl says."""
    values = np.random.default_rng(1).lognormal(size=(STEPS, 2)).tolist()
    steps = [
        {
            "step": step,
            "loss": one + other,
            "instance_loss": one,
            "prior_loss": other,
            "lr": 2e-6,
            "seconds": 0.4,
            "peak_bytes": 2**33,
        }
        for step, (one, other) in enumerate(values, 1)
    ]
    validations = [
        {"step": step, "validation_subject": 0.9, "validation_class": 1.0} for step in range(0, STEPS + 1, 160)
    ]
    return [*steps, *validations]


def picture(generator: np.random.Generator, steepness: float) -> Image.Image:
    """SIDE x SIDE pixels of noise whose amplitudes fall with frequency."""
    across = np.fft.fftfreq(SIDE)
    frequency = np.maximum(np.hypot(across[:, None], across), 1 / SIDE)[..., None]
    spectrum = np.fft.fft2(generator.normal(size=(SIDE, SIDE, 3)), axes=(0, 1)) / frequency**steepness
    values = np.fft.ifft2(spectrum, axes=(0, 1)).real
    return Image.fromarray((127 + 50 * values / values.std()).clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
