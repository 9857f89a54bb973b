import weakref
from pathlib import Path

import pytest
import torch

import lowvram_db
from lowvram_db.cache import Framing, Store, precompute
from lowvram_db.families import open_model

CPU = torch.device("cpu")


class Counting:
    """A family that counts what goes through its encoders, and watches their weights."""

    def __init__(self, family):
        self.family, self.images, self.prompts, self.alive, self.loaded = family, 0, 0, [], []

    def __getattr__(self, name):
        return getattr(self.family, name)

    def load_vae(self, dtype=torch.float32):
        assert not self.living(), "another encoder is still there when the VAE arrives"
        return self._watched(self.family.load_vae(dtype), dtype)

    def load_text_encoders(self, dtype=torch.float32):
        assert not self.living(), "another encoder is still there when the text encoders arrive"
        encoders = self.family.load_text_encoders(dtype)
        return {part: self._watched(encoder, dtype) for part, encoder in encoders.items()}

    def encode_images(self, vae, pixels):
        self.images += len(pixels)
        return self.family.encode_images(vae, pixels)

    def encode_prompts(self, text_encoders, prompts):
        self.prompts += len(prompts)
        return self.family.encode_prompts(text_encoders, prompts)

    def counts(self):
        """Images and prompts encoded since the last time."""
        counts, self.images, self.prompts = (self.images, self.prompts), 0, 0
        return counts

    def _watched(self, module, dtype):
        self.loaded.append(dtype)
        self.alive += [weakref.ref(module), *(weakref.ref(parameter) for parameter in module.parameters())]
        return module

    def living(self):
        return [reference for reference in self.alive if reference() is not None]


@pytest.fixture
def counting(family):
    return Counting(family)


@pytest.fixture
def photo_files(photos, tmp_path) -> list[Path]:
    """Five photos that may be changed."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in sorted(photos.iterdir()):
        (folder / photo.name).write_bytes(photo.read_bytes())
    return sorted(folder.iterdir())


@pytest.fixture
def build(tmp_path):
    """Open tmp_path/cache anew, precompute and close: what stands in it of these photos and prompts."""

    def build(family, photos, prompts=(), folder=tmp_path / "cache", framing=None, **how):
        with Store(folder) as store:
            return precompute(family, store, CPU, framing=framing or Framing(64), photos=photos, prompts=prompts, **how)

    return build


@pytest.fixture(scope="session")
def base_family():
    """The small trained model that comes with the package."""
    return open_model(str(Path(lowvram_db.__file__).parent / "demo" / "base"))
