import gc
import weakref

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextModel

from lowvram_db.cache.key import latent_key, text_key
from lowvram_db.cache.precompute import precompute
from lowvram_db.cache.store import Store
from lowvram_db.errors import UserError
from lowvram_db.photos import find_photos, load_photo, to_pixels

CPU = torch.device("cpu")
PROMPTS = ["a photo of a pkblz ball", "a photo of a ball"]


class Counting:
    """A family that counts what goes through its encoders."""

    def __init__(self, family):
        self._family, self.images, self.prompts, self.alive = family, 0, 0, []

    def __getattr__(self, name):
        return getattr(self._family, name)

    def load_vae(self):
        assert not self._living(), "the text encoder is still there when the VAE arrives"
        return self._watched(self._family.load_vae())

    def load_text_encoder(self):
        return self._watched(self._family.load_text_encoder())

    def encode_images(self, vae, pixels):
        self.images += len(pixels)
        return self._family.encode_images(vae, pixels)

    def encode_prompts(self, text_encoder, prompts):
        self.prompts += len(prompts)
        return self._family.encode_prompts(text_encoder, prompts)

    def _watched(self, module):
        self.alive += [weakref.ref(module), *(weakref.ref(parameter) for parameter in module.parameters())]
        return module

    def _living(self):
        return [reference for reference in self.alive if reference() is not None]


@pytest.fixture
def counting(family):
    return Counting(family)


@pytest.fixture
def photo_files(photos):
    return find_photos(photos, "subject.photos")


def test_cached_values_are_the_encoders_own(counting, photo_files, tmp_path):
    cached = precompute(counting, photo_files, PROMPTS, 64, Store(tmp_path), CPU)
    vae, text_encoder = counting.load_vae(), counting.load_text_encoder()
    with torch.no_grad():
        for photo in photo_files:
            wanted = counting.encode_images(vae, to_pixels(load_photo(photo), 64)[None])
            torch.testing.assert_close(cached.moments[photo].mean, wanted.mean[0])
            torch.testing.assert_close(cached.moments[photo].logvar, wanted.logvar[0])
        for prompt in PROMPTS:
            wanted = counting.encode_prompts(text_encoder, [prompt])[0]
            torch.testing.assert_close(cached.conditioning[prompt], wanted)
    assert cached.moments[photo_files[0]].mean.shape == (4, 8, 8)
    assert not any(tensor.requires_grad for tensor in cached.conditioning.values())


def test_the_encoders_are_gone_afterwards(counting, photo_files, tmp_path):
    """Not only unreachable by name: no weight of them is left in the process."""
    precompute(counting, photo_files, PROMPTS, 64, Store(tmp_path), CPU)
    assert len(counting.alive) > 50
    assert not counting._living()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, AutoencoderKL | CLIPTextModel)]


def test_a_second_time_encodes_nothing(counting, photo_files, tmp_path):
    first = precompute(counting, photo_files, PROMPTS, 64, Store(tmp_path), CPU)
    counting.images = counting.prompts = 0
    second = precompute(counting, photo_files, PROMPTS, 64, Store(tmp_path), CPU)
    assert (counting.images, counting.prompts) == (0, 0)
    assert (first.latent_keys, first.text_keys) == (second.latent_keys, second.text_keys)
    for photo in photo_files:
        assert torch.equal(first.moments[photo].mean, second.moments[photo].mean)


def test_only_what_changed_is_encoded_again(counting, photo_files, tmp_path):
    copies = [tmp_path / photo.name for photo in photo_files]
    for photo, copy in zip(photo_files, copies, strict=True):
        copy.write_bytes(photo.read_bytes())
    store = Store(tmp_path / "cache")
    before = precompute(counting, copies, PROMPTS, 64, store, CPU)
    counting.images = counting.prompts = 0
    Image.effect_noise((80, 80), 60).save(copies[2])
    copies[0].touch()
    after = precompute(counting, copies, [*PROMPTS, "new"], 64, store, CPU)
    assert (counting.images, counting.prompts) == (1, 1)
    assert not torch.equal(before.moments[copies[2]].mean, after.moments[copies[2]].mean)
    precompute(counting, copies, PROMPTS, 32, store, CPU)
    assert counting.images == 1 + len(copies), "another resolution is another latent"


def test_a_damaged_entry_is_encoded_again(counting, photo_files, tmp_path):
    precompute(counting, photo_files, PROMPTS, 64, Store(tmp_path), CPU)
    victim = min(tmp_path.glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:50])
    counting.images = counting.prompts = 0
    precompute(counting, photo_files, PROMPTS, 64, Store(tmp_path), CPU)
    assert counting.images + counting.prompts == 1


def test_what_was_encoded_before_an_error_is_kept(counting, photo_files, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_text("no photo")
    with pytest.raises(UserError, match=r"bad\.jpg"):
        precompute(counting, [*photo_files, bad], PROMPTS, 64, Store(tmp_path / "cache"), CPU)
    counting.images = counting.prompts = 0
    precompute(counting, photo_files, PROMPTS, 64, Store(tmp_path / "cache"), CPU)
    assert (counting.images, counting.prompts) == (0, 0)


def test_keys_depend_on_everything_that_matters():
    pixels = torch.rand(3, 8, 8)
    keys = {
        latent_key(pixels, "vae"),
        latent_key(pixels, "other vae"),
        latent_key(pixels.reshape(3, 4, 16), "vae"),
        latent_key(pixels + 1e-6, "vae"),
        text_key("a ball", "text"),
        text_key("a ball", "other text"),
        text_key("a  ball", "text"),
    }
    assert len(keys) == 7
    assert latent_key(pixels.clone(), "vae") in keys


def test_another_encoder_is_another_key(counting, photo_files, tmp_path, miniature):
    import shutil

    from lowvram_db.families import open_model

    store = Store(tmp_path / "cache")
    precompute(counting, photo_files, PROMPTS, 64, store, CPU)
    copy = shutil.copytree(miniature, tmp_path / "model")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    changed = Counting(open_model(str(copy)))
    precompute(changed, photo_files, PROMPTS, 64, store, CPU)
    assert (changed.images, changed.prompts) == (len(photo_files), 0)
