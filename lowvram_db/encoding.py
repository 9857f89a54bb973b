"""What a run's encoders say, by its settings: from its cache, encoded where it is not there yet."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowvram_db.cache import Cached, Framing, Store, precompute
from lowvram_db.cache.catalogue import Catalogue
from lowvram_db.cache.precompute import views_of
from lowvram_db.concept import Concept, crop_boxes
from lowvram_db.concept.masks import load_mask, loss_weights
from lowvram_db.config import Config
from lowvram_db.families.base import NO_PROMPT, Family
from lowvram_db.families.conditioning import Conditioning
from lowvram_db.memory.device import encoder_dtype
from lowvram_db.run import Run
from lowvram_db.train.trained import trains_text

_UPPER_THIRD = 1 / 3  # of a photo's height: where the faces of people are
_BUCKET_MULTIPLE = 64  # of the sides of buckets, pixels; too coarse for small pictures


def cache_folder(config: Config, run: Run) -> Path:
    return Path(config.cache.dir).expanduser() if config.cache.dir else run.cache


def encode_all(
    config: Config,
    family: Family,
    store: Store,
    concept: Concept,
    device: torch.device,
    begins: Callable[[str], None] = lambda phase: None,
    step: int = 0,
) -> Cached:
    """Everything the encoders have to say; conditioning is left out where this step trains the text encoders."""
    prompts = [] if trains_text(config, step) else concept.prompts
    if prompts and config.sample.every:
        prompts = [*prompts, *map(config.fill, config.sample.prompts), NO_PROMPT]
    encoded = partial(encode, config, family, store, device, prompts=prompts)
    begins("text encoding")  # by itself, to be measured so; from the store afterwards
    encoded(photos=[])
    begins("latent encoding")
    return encoded(photos=concept.instance_photos, class_photos=concept.class_photos)


def encode_text(config: Config, family: Family, store: Store, device: torch.device, prompts: list[str]) -> Conditioning:
    """What the model's own text encoders say of prompts: from the store, encoded where it is not there yet."""
    return encode(config, family, store, device, photos=[], prompts=prompts).conditioning(prompts)


def encode(config: Config, family: Family, store: Store, device: torch.device, **what: Any) -> Cached:
    """what: photos, class photos and prompts."""
    dtype = encoder_dtype(config.cache.precision, config.precision.compute, device)
    crops = crop_boxes(what["photos"])
    return precompute(family, store, device, framing=_framing(config, family), dtype=dtype, crops=crops, **what)


def check_pictures(config: Config, family: Family, concept: Concept, catalogue: Catalogue) -> None:
    """Raise UserError for what would only be found when everything is encoded: crop boxes larger than their photos, and
    masks that cannot be read, are of another shape, or show nothing in a view."""
    framing, crops = _framing(config, family), crop_boxes(concept.instance_photos)
    for photo in concept.instance_photos:
        views = views_of(photo, catalogue.look(photo), framing, crops)
        if mask := concept.masks.get(photo):
            shown = load_mask(mask)
            for view in views:
                width, height = (side // family.latent_side for side in view.size)
                loss_weights(shown, view, (width, height), concept.mask_weight, mask)


def _framing(config: Config, family: Family) -> Framing:
    train = config.train
    multiple = _BUCKET_MULTIPLE if train.resolution >= 4 * _BUCKET_MULTIPLE else family.side_multiple
    centre = _UPPER_THIRD if train.crop == "subject" and config.subject.is_person else 0.5
    return Framing(train.resolution, train.crop, train.variants, train.flip, train.seed, multiple, centre)
