"""What a LoRA learns on the demo beside a full DreamBooth, and what of a full one is left in LoRAs taken out of it.

    python bench/lora.py --seeds 5 --set train.lr=2e-3                  # --set is for the LoRA that is trained
    python bench/lora.py --first 5 --only trained --set train.lr=1e-3   # that LoRA alone, to find its settings
    python bench/lora.py --ranks "" --first 1                           # without those that are taken out

Trains configs/demo.toml both ways and appends the figures of demo_learning.py to bench/results/lora.csv, a row a
figure, with each file's size and, of what was taken out, the share of the change that is kept. Of the first seed
docs/lora.png is drawn: base model, full, LoRAs taken out of it by rank, the trained one, from the same noise.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from demo_learning import CONFIG, figures
from machine import add_row
from PIL import Image

from lowvram_db.config import Config, load
from lowvram_db.dreambooth import run_dreambooth
from lowvram_db.families import open_model
from lowvram_db.formats.export import Format, export
from lowvram_db.formats.extraction import export_lora
from lowvram_db.formats.merge import merge
from lowvram_db.run import Run
from lowvram_db.sheet import draw_grid

SHEET = Path(__file__).parents[1] / "docs" / "lora.png"
_RANK = 16
_LORA = ["method.name=lora", f"method.rank={_RANK}"]
_PLACES = ("", " in snow", " on grass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many training seeds")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--ranks", default="4,8,16,32,64", help="of what is taken out of the full one")
    parser.add_argument("--only", choices=["trained"], help="train the LoRA and nothing else")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="as lowvram-db train --set")
    given = parser.parse_args()
    ranks = [int(rank) for rank in given.ranks.split(",") if rank]
    for seed in range(given.first, given.first + given.seeds):
        with tempfile.TemporaryDirectory() as place:
            models: dict[str, Path] = {}
            if given.only is None:
                models |= full_and_taken_out(Path(place), seed, ranks)
            models["trained"] = trained(Path(place), seed, given.overrides)
            if seed == 0 and ranks and given.only is None:
                draw(models)


def full_and_taken_out(place: Path, seed: int, ranks: list[int]) -> dict[str, Path]:
    """The folders of a full model, and of the base with each LoRA of it, by what they are."""
    run = train(place, "full", seed, [])
    report("full", seed, "", run.model, {})
    made = {"full": run.model}
    for rank in ranks:
        file, whole = place / f"rank-{rank}.safetensors", place / f"rank-{rank}"
        found = export_lora(str(run.folder), file, rank, None, torch.float16, torch.device("cpu"))
        merge(load(CONFIG).model.name, file, 1.0, whole)
        energy = sum(group.energy for group in found.groups.values()) + sum(found.left.values())
        kept = sum(group.kept for group in found.groups.values()) / energy
        report(f"rank {rank} of the full one", seed, "", whole, {"kept": kept, "MiB": file.stat().st_size / 2**20})
        made[f"rank {rank}"] = whole
    return made


def trained(place: Path, seed: int, overrides: list[str]) -> Path:
    """The folder of the base with a LoRA in it that was trained."""
    run, whole = train(place, "lora", seed, [*_LORA, *overrides]), place / "with-lora"
    export(str(run.folder), whole, Format.diffusers)
    more = {"MiB": run.lora.stat().st_size / 2**20}
    report(f"LoRA of rank {_RANK}", seed, " ".join(overrides), whole, more)
    return whole


def train(place: Path, name: str, seed: int, overrides: list[str]) -> Run:
    return run_dreambooth(
        load(CONFIG, [f"output.dir={place}", f"output.name={name}", f"train.seed={seed}", *overrides])
    )


def report(what: str, seed: int, overrides: str, model: Path, more: dict[str, float]) -> None:
    """Append a row for each figure of one model's folder."""
    for metric, value in {**figures(str(model), []), **more}.items():
        row = {"model": what, "seed": seed, "overrides": overrides, "metric": metric, "value": f"{value:.4f}"}
        add_row("lora", row)
        print(f"{what}, seed {seed}: {metric} {value:.3f}", flush=True)


def draw(models: dict[str, Path]) -> None:
    """A picture of every prompt by every model, from the same noise."""
    config = load(CONFIG)
    subject, plain = config.fill(config.subject.plain_template), config.fill(config.prior.prompt)
    prompts = [*(subject + place for place in _PLACES), plain]
    columns = {"base": config.model.name, **{name: str(folder) for name, folder in models.items()}}
    pictures = [drawn(model, prompts, config) for model in columns.values()]
    rows = [list(row) for row in zip(*pictures, strict=True)]
    draw_grid(rows, prompts, [f"trained, {_RANK}" if name == "trained" else name for name in columns]).save(SHEET)


def drawn(model: str, prompts: list[str], config: Config) -> list[Image.Image]:
    """A picture of each prompt from the same noise, enlarged."""
    side = config.train.resolution
    images = (
        open_model(model)
        .pipeline()(
            prompts,
            guidance_scale=config.sample.guidance[0],
            num_inference_steps=config.sample.steps,
            height=side,
            width=side,
            generator=[torch.Generator().manual_seed(0) for _ in prompts],
        )
        .images
    )
    return [image.resize((2 * side, 2 * side), Image.Resampling.LANCZOS) for image in images]


if __name__ == "__main__":
    main()
