from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lowvram_db.cache import Framing, Store, precompute
from lowvram_db.concept import describe, subject_photos
from lowvram_db.config import Config
from lowvram_db.families import open_blank, open_model
from lowvram_db.plan import predict
from lowvram_db.train.batches import Batches
from lowvram_db.train.checkpoint import frozen, read_state
from lowvram_db.train.strategy import Event, Strategy
from lowvram_db.train.trained import trains_text
from lowvram_db.train.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def order_of() -> Callable[..., list[Event]]:
    """What a step does that recomputes everything, or as a strategy says."""

    def order(config: Config, strategy: Strategy | None = None) -> list[Event]:
        family = open_blank(Path(config.model.name))
        with predict.rehearsal(config, family) as traced:
            traced.steps(strategy or Strategy(family.checkpoint_steps, family.checkpoint_steps))
            return traced.order()

    return order


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., Trainer]:
    """A trainer at step 0; the subject's own photos stand in for class images, which saves generating them."""

    def make(
        config: Config, device: torch.device = CPU, start: Path | None = None, order: Sequence[Event] = ()
    ) -> Trainer:
        """start: a checkpoint to go on from."""
        family = open_model(config.model.name)
        step = read_state(start).step if start else 0
        if config.text_encoder.train and not trains_text(config, step):
            family = family.with_tuned(frozen(start))
        photos = subject_photos(config)
        concept = describe(config, photos, photos[::-1] if config.prior.enabled else [])
        prompts = [] if trains_text(config, step) else concept.prompts
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
        trainer = Trainer(config, family, batches, device, step=step, order=order)
        if start:
            trainer.restore(start)
        return trainer

    return make
