"""Whether a base model predicts what its scheduler says, found before anything is made with it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lowvram_db.cache import Store
from lowvram_db.config import Config
from lowvram_db.encoding import encode
from lowvram_db.errors import UserError
from lowvram_db.families.base import Family
from lowvram_db.families.conditioning import collated
from lowvram_db.families.prediction import Picture, errors, spoken_instead
from lowvram_db.memory.device import picture_dtypes, release_memory
from lowvram_db.memory.only_read import OnlyRead
from lowvram_db.progress import say

_PURPOSE = "the check of what is predicted"


def check_prediction(
    config: Config,
    family: Family,
    store: Store,
    photos: list[Path],
    device: torch.device,
    begins: Callable[[str], None],
    streamed: bool = False,
) -> None:
    """See that the base weights predict what the model's scheduler says. Raises UserError where they do not by far,
    and says so where the user has decided. streamed: whether it is known that they have to come from RAM."""
    prompt, said = config.fill(config.prior.prompt), family.noise_schedule.prediction_type
    begins("text encoding")
    encode(config, family, store, device, photos=[], prompts=[prompt])
    begins("latent encoding")
    cached = encode(config, family, store, device, photos=photos, prompts=[prompt])
    begins(_PURPOSE)
    pictures = [
        Picture(
            cached.moments(frame.keys[:1]).mean,
            cached.conditioning([prompt]) | collated([family.view_conditioning(frame.views[0])]),
        )
        for frame in cached.photos.values()
    ]
    dtype, _ = picture_dtypes(config.precision.compute, device)
    denoiser = OnlyRead(family.load_denoiser(lambda weight: weight.to(dtype)), device, _PURPOSE, streamed)
    read = denoiser.read(partial(errors, family, denoiser.network, pictures, dtype))
    del denoiser
    release_memory()
    if (speaks := spoken_instead(read, said)) is None:
        return
    found = f"the weights predict {speaks}, not {said} (errors of {read[speaks]:.2f} and {read[said]:.2f})"
    if config.model.prediction_type is None:
        where = family.folder / "scheduler" / "scheduler_config.json"
        raise UserError(f'{where}: says {said}, but {found}; set model.prediction_type = "{speaks}"')
    say(f"model.prediction_type: is {said}, but {found}")
