import gc

import pytest
import torch

from lowvram_db.cache.encoder import ImageEncoder
from lowvram_db.framing import to_float

CPU = torch.device("cpu")


class Small:
    """A family on a device that has room for so many pixels at once, and a VAE that was made for a number of pixels a
    side."""

    def __init__(self, family, room, made_for=64):
        self._family, self.room, self.made_for, self.calls = family, room, made_for, []

    def __getattr__(self, name):
        return getattr(self._family, name)

    def load_vae(self, dtype):
        vae = self._family.load_vae(dtype)
        vae.tile_sample_min_size, vae.tile_latent_min_size = self.made_for, self.made_for // 8
        return vae

    def encode_images(self, vae, pixels):
        self.calls.append(len(pixels))
        side = min(vae.tile_sample_min_size if vae.use_tiling else pixels.shape[-1], pixels.shape[-1])
        if len(pixels) * side * side > self.room:
            raise RuntimeError("GET was unable to find an engine to execute this computation")  # as cuDNN says it
        return self._family.encode_images(vae, pixels)


def images(count, side=64):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def alone(family, pixels):
    vae = family.load_vae()
    with torch.no_grad():
        parts = [family.encode_images(vae, to_float(image[None])) for image in pixels]
    return torch.cat([part.mean for part in parts]), torch.cat([part.logvar for part in parts])


def test_a_batch_that_does_not_fit_is_halved_until_it_does(family):
    small = Small(family, room=2 * 64 * 64)
    with ImageEncoder(small, CPU, torch.float32) as encoder:
        moments = encoder.encode(images(7))
        assert small.calls == [7, 3, 1, 1, 1, 1, 1, 1, 1]
        assert not encoder.tiled
    for got, wanted in zip(moments, alone(family, images(7)), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_gpus_batches_follow_from_the_memory_that_the_first_image_took(family, monkeypatch):
    """The GPU's own counters, played: 1,000 bytes are free, an image takes 90."""
    peaks = iter([500, 590])
    monkeypatch.setattr("lowvram_db.cache.encoder.reset_peak", lambda device: None)
    monkeypatch.setattr("lowvram_db.cache.encoder.peak_bytes", lambda device: next(peaks))
    monkeypatch.setattr("lowvram_db.cache.encoder.free_bytes", lambda device: 1000)
    with ImageEncoder(family, CPU, torch.float32) as encoder:
        encoder._measures = True
        assert encoder.batch(images(1)[0]) == 1
        encoder.encode(images(1))
        assert encoder.batch(images(1)[0]) == 800 // 90
        assert encoder.batch(images(1, side=128)[0]) == 1
        encoder.encode(images(8))


def test_one_image_that_does_not_fit_goes_through_in_tiles(family):
    small = Small(family, room=64 * 64)
    with ImageEncoder(small, CPU, torch.float32) as encoder:
        moments = encoder.encode(images(2, side=128))
        assert encoder.tiled == 1
        assert small.calls == [2, 1, 1, 1]
        encoder.unload()
        encoder.encode(images(1, side=128))  # a VAE that is loaded anew works in tiles too
    wanted = alone(family, images(2, side=128))
    assert moments.mean.shape == wanted[0].shape == (2, 4, 16, 16)
    corner = (slice(None), slice(None), slice(0, 2), slice(0, 2))  # farthest from the seams
    assert not torch.equal(moments.mean, wanted[0])
    torch.testing.assert_close(moments.mean[corner], wanted[0][corner], rtol=0.2, atol=0.02)


def test_one_as_large_as_its_vae_was_made_for_goes_through_in_smaller_tiles(family, capfd):
    small = Small(family, room=256 * 256, made_for=512)
    with ImageEncoder(small, CPU, torch.float32) as encoder:
        first = encoder.encode(images(1, side=512)).mean
        assert (encoder.tiled, small.calls) == (2, [1, 1, 1])
        encoder.unload()
        assert torch.equal(encoder.encode(images(1, side=512)).mean, first), "as small from then on"
        assert len(small.calls) == 4
    assert "photos: out of memory; encoded in tiles of 256 px from here on" in capfd.readouterr().err


@pytest.mark.parametrize("made_for", [64, 512])
def test_what_fits_in_no_way_is_said(family, made_for):
    with (
        pytest.raises(RuntimeError, match="engine"),
        ImageEncoder(Small(family, 10, made_for), CPU, torch.float32) as encoder,
    ):
        encoder.encode(images(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_and_comes_out_as_float32(family, dtype):
    exact = alone(family, images(3))
    with ImageEncoder(family, CPU, dtype) as encoder:
        for got, wanted in zip(encoder.encode(images(3)), exact, strict=True):
            assert got.dtype == torch.float32
            error = (got - wanted).abs().max() / wanted.std()
            assert 0 < error < (0.02 if dtype == torch.float16 else 0.15)


def test_nothing_is_loaded_before_it_is_needed_nor_kept_after(family):
    class Loading:
        loads = 0

        def __getattr__(self, name):
            return getattr(family, name)

        def load_vae(self, dtype):
            self.loads += 1
            return family.load_vae(dtype)

    loading = Loading()
    with ImageEncoder(loading, CPU, torch.float32) as encoder:
        assert loading.loads == 0
        encoder.encode(images(1))
        encoder.encode(images(1))
        assert loading.loads == 1
        encoder.unload()
        assert not [thing for thing in gc.get_objects() if type(thing).__name__ == "AutoencoderKL"]
        encoder.encode(images(1))
    assert loading.loads == 2
    assert not [thing for thing in gc.get_objects() if type(thing).__name__ == "AutoencoderKL"]
