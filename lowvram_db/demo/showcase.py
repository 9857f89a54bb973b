"""Before and after, from the same noise: the base model beside models that DreamBooth made of it.

`python -m lowvram_db.demo RUN OTHER_RUN` draws the subject where it was photographed and elsewhere, and the
plain class, with the base model, with RUN's and with OTHER_RUN's, into RUN/before-after.png.
"""

from pathlib import Path

import torch
from PIL import Image

from lowvram_db.atomic import replacing_file
from lowvram_db.config import Config, load
from lowvram_db.demo.subjects import SUBJECTS
from lowvram_db.families import open_model
from lowvram_db.run import Run
from lowvram_db.sheet import draw_grid

SUBJECT = SUBJECTS["iridescent-jellyfish"]
ELSEWHERE = ("in snow", "on grass", "in the desert")
SEEDS = 2
_ENLARGED = 2


def before_after(trained: Run, other: Run) -> Path:
    """Draw the grid of two finished runs on one base model and return its path."""
    config, other_config = load(trained.config), load(other.config)
    instance, plain = (config.fill(template) for template in (config.subject.plain_template, config.prior.prompt))
    places = [SUBJECT.photographed[0], *ELSEWHERE]
    prompts = [*(f"{instance} {place}" for place in places), plain]
    models = {
        "base": config.model.name,
        _described(config): str(trained.model),
        _described(other_config): str(other.model),
    }
    pictures = [_draw(model, prompts, config) for model in models.values()]
    rows = [[picture for model in pictures for picture in model[row]] for row in range(len(prompts))]
    labels = [f"{name}, seed {seed}" for name in models for seed in range(SEEDS)]
    path = trained.folder / "before-after.png"
    with replacing_file(path) as temporary:
        draw_grid(rows, prompts, labels).save(temporary, format="PNG")
    return path


def _described(config: Config) -> str:
    return "with prior" if config.prior.enabled else "no prior"


def _draw(model: str, prompts: list[str], config: Config) -> list[list[Image.Image]]:
    """SEEDS pictures of every prompt, in rows."""
    side = config.train.resolution
    drawn = open_model(model).pipeline()(
        [prompt for prompt in prompts for _ in range(SEEDS)],
        guidance_scale=config.sample.guidance[0],
        num_inference_steps=config.sample.steps,
        height=side,
        width=side,
        generator=[torch.Generator().manual_seed(seed) for _ in prompts for seed in range(SEEDS)],
    )
    large = [image.resize((_ENLARGED * side, _ENLARGED * side), Image.Resampling.LANCZOS) for image in drawn.images]
    return [large[first : first + SEEDS] for first in range(0, len(large), SEEDS)]
