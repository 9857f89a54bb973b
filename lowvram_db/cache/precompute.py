"""Run each encoder once over what it has not seen yet, one encoder in memory at a time, and let it go."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowvram_db.cache.key import files_digest, latent_key, text_key
from lowvram_db.cache.store import Store
from lowvram_db.families.base import Family, Moments
from lowvram_db.memory.device import release_memory
from lowvram_db.photos import load_photo, to_pixels
from lowvram_db.progress import Bar


@dataclass(frozen=True)
class Cached:
    """What training needs of the encoders, in CPU memory."""

    moments: dict[Path, Moments]  # float32 [C, h, w] each
    conditioning: dict[str, Tensor]  # float32 [tokens, width] each
    latent_keys: dict[Path, str]  # what identifies the content of each photo
    text_keys: dict[str, str]  # and of each prompt


def precompute(
    family: Family,
    photos: list[Path],
    prompts: list[str],
    resolution: int,
    store: Store,
    device: torch.device,
) -> Cached:
    """Moments of every photo and conditioning of every prompt, from the store or newly encoded into it.

    The encoders run in float32. Neither is alive any more when this returns. Raises UserError for a photo that cannot
    be read or a disk that is full; what was encoded until then stays stored.
    """
    conditioning, text_keys = _encode_prompts(family, prompts, store, device)
    moments, latent_keys = _encode_photos(family, photos, resolution, store, device)
    return Cached(moments, conditioning, latent_keys, text_keys)


@torch.no_grad()
def _encode_prompts(
    family: Family, prompts: list[str], store: Store, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, str]]:
    digest = files_digest(family.text_files)
    keys = {prompt: text_key(prompt, digest) for prompt in prompts}
    missing = [prompt for prompt, key in keys.items() if store.get(key) is None]
    if missing:
        text_encoder = family.load_text_encoder().to(device)
        for prompt in missing:
            store.put(keys[prompt], {"conditioning": family.encode_prompts(text_encoder, [prompt])[0]})
        del text_encoder
        release_memory()
    return {prompt: _stored(store, key)["conditioning"] for prompt, key in keys.items()}, keys


@torch.no_grad()
def _encode_photos(
    family: Family, photos: list[Path], resolution: int, store: Store, device: torch.device
) -> tuple[dict[Path, Moments], dict[Path, str]]:
    digest = files_digest(family.vae_files)
    moments: dict[Path, Moments] = {}
    keys: dict[Path, str] = {}
    vae = None
    with Bar("encoding photos", total=len(photos), unit="photo") as bar:
        for photo in photos:
            pixels = to_pixels(load_photo(photo), resolution)
            key = latent_key(pixels, digest)
            entry = store.get(key)
            if entry is None:
                vae = vae or family.load_vae().to(device)
                mean, logvar = family.encode_images(vae, pixels[None])
                store.put(key, {"mean": mean[0], "logvar": logvar[0]})
                entry = _stored(store, key)
            moments[photo] = Moments(entry["mean"], entry["logvar"])
            keys[photo] = key
            bar.advance()
    del vae
    release_memory()
    return moments, keys


def _stored(store: Store, key: str) -> dict[str, Tensor]:
    entry = store.get(key)
    assert entry is not None, f"cache entry {key} vanished while it was in use"
    return entry
