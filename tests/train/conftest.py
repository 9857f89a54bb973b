from collections.abc import Callable

import pytest
import torch

from lowvram_db.cache import Framing, Store, precompute
from lowvram_db.concept import describe, subject_photos
from lowvram_db.config import Config
from lowvram_db.families import open_model
from lowvram_db.train.batches import Batches
from lowvram_db.train.loop import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., Trainer]:
    """A trainer at step 0; the subject's own photos stand in for class images, which saves generating them."""

    def make(config: Config, device: torch.device = CPU) -> Trainer:
        family = open_model(config.model.name)
        photos = subject_photos(config)
        concept = describe(config, photos, photos[::-1] if config.prior.enabled else [])
        prompts = [] if config.train.text_encoder else concept.prompts
        cached = precompute(
            family,
            Store(tmp_path / "cache"),
            device,
            framing=Framing(config.train.resolution, config.train.crop, multiple=16),
            photos=concept.instance_photos,
            class_photos=concept.class_photos,
            prompts=prompts,
        )
        batches = Batches(concept, cached, config.train.batch, config.train.seed, config.train.hold_out)
        return Trainer(config, family, batches, device)

    return make
