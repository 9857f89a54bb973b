"""What the encoders made, kept by content: latent moments and text embeddings, for this trainer and for others.

    family = open_model("stable-diffusion-v1-5/stable-diffusion-v1-5")
    with Store(Path("cache")) as store:
        cached = precompute(family, store, device, framing=Framing(512), photos=photos, prompts=prompts)
        mean, logvar = cached.moments([cached.photos[photo].keys[0] for photo in batch])
        text = cached.conditioning(["a photo of a pkblz dog"] * len(batch))["text"]

docs/cache.md says what an entry is valid for and what a crash, a second process or a damaged disk can and cannot do to
it; docs/cache_example.py trains a UNet of diffusers from a cache.
"""

from lowvram_db.cache.precompute import Cached, ClassFrame, Frame, model_digest, precompute
from lowvram_db.cache.store import Report, Store, catalogue_of
from lowvram_db.framing import Framing, View

__all__ = [
    "Cached",
    "ClassFrame",
    "Frame",
    "Framing",
    "Report",
    "Store",
    "View",
    "catalogue_of",
    "model_digest",
    "precompute",
]
