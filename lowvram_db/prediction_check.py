"""Whether a base model predicts what its scheduler says, found before anything is made with it."""

from collections.abc import Callable
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
from lowvram_db.progress import say


def check_prediction(
    config: Config,
    family: Family,
    store: Store,
    photos: list[Path],
    device: torch.device,
    begins: Callable[[str], None],
) -> None:
    """See that the base weights predict what the model's scheduler says. Raises UserError where they do not by far,
    and says so where the user has decided."""
    prompt, said = config.fill(config.prior.prompt), family.noise_schedule.prediction_type
    begins("text encoding")
    encode(config, family, store, device, photos=[], prompts=[prompt])
    begins("latent encoding")
    cached = encode(config, family, store, device, photos=photos, prompts=[prompt])
    begins("the check of what is predicted")
    pictures = [
        Picture(
            cached.moments(frame.keys[:1]).mean,
            cached.conditioning([prompt]) | collated([family.view_conditioning(frame.views[0])]),
        )
        for frame in cached.photos.values()
    ]
    dtype, _ = picture_dtypes(config.precision.compute, device)
    denoiser = family.load_denoiser(lambda weight: weight.to(dtype)).to(device)
    read = errors(family, denoiser, pictures, dtype)
    del denoiser
    release_memory()
    if (speaks := spoken_instead(read, said)) is None:
        return
    found = f"the weights predict {speaks}, not {said} (errors of {read[speaks]:.2f} and {read[said]:.2f})"
    if config.model.prediction_type is None:
        where = family.folder / "scheduler" / "scheduler_config.json"
        raise UserError(f'{where}: says {said}, but {found}; set model.prediction_type = "{speaks}"')
    say(f"model.prediction_type: is {said}, but {found}")
