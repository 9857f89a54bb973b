from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lowvram_db.errors import UserError
from lowvram_db.families.draw import Drawer, Wanted
from lowvram_db.memory.device import picture_dtypes

CPU = torch.device("cpu")
HOW = {"steps": 1, "resolution": 4}


class Network(nn.Module):
    """Something that lies somewhere in some precision."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))

    @property
    def dtype(self):
        return self.weight.dtype


class Family:
    """Latents are the first numbers of their generators; what the denoiser or the VAE gives in the precisions that are
    named is no number, in one picture of those that are made together."""

    folder = "model"

    def __init__(self, denoiser_overflows=(), vae_overflows=(), fits=lambda: True):
        self.denoiser_overflows, self.vae_overflows, self.fits = denoiser_overflows, vae_overflows, fits
        self.loaded, self.tiled = [], False

    def sampler(self, denoiser):
        def pipeline(prompt_embeds, num_images_per_prompt, generator, **_):
            assert num_images_per_prompt == len(generator) and prompt_embeds.dtype == denoiser.dtype
            latents = torch.stack([torch.rand(3, 4, 4, generator=one) for one in generator])
            if denoiser.dtype in self.denoiser_overflows:
                latents[-1, 0, 0] = torch.nan
            return SimpleNamespace(images=latents)

        return pipeline

    def sampling_inputs(self, conditioning):
        return {"prompt_embeds": conditioning["text"]}

    def load_vae(self, dtype):
        self.loaded.append(dtype)
        return Network(dtype)

    def tile(self, vae):
        self.tiled = True

    def decode_latents(self, vae, latents):
        assert len(latents) == 1, "more than one picture at once"
        if not self.fits():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return torch.full_like(latents, torch.inf) if vae.dtype in self.vae_overflows else latents * 2 - 1


def drawer(family, dtype=torch.float16, **how):
    return Drawer(family, Network(dtype), CPU, dtype, at_once=4, **how)


def drawn(drawer, seeds):
    pictures = [Wanted(seed, guidance=1.0) for seed in seeds]
    return [np.asarray(picture) for picture in drawer.draw({"text": torch.zeros(2, 1)}, pictures, **HOW)]


def first_numbers(seed):
    numbers = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (numbers * 255).round().byte().permute(1, 2, 0).numpy()


def are_right(pictures, seeds):
    return all(
        np.abs(picture.astype(int) - first_numbers(seed)).max() <= 1
        for picture, seed in zip(pictures, seeds, strict=True)
    )


def test_a_denoiser_that_overflows_in_fp16_draws_again_from_the_same_noise_and_says_so_once(capfd):
    drawing = drawer(Family(denoiser_overflows={torch.float16}), wider=torch.bfloat16)
    for seeds in ([3, 4], [5]):
        assert are_right(drawn(drawing, seeds), seeds)
    assert capfd.readouterr().err.count("overflows in fp16: its pictures are drawn in bfloat16 from here on") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vae_that_overflows_is_replaced_by_its_float32_weights_and_nothing_else_is(dtype, capfd):
    """Weights in training, too, whose own precision nobody may change."""
    family = Family(vae_overflows={torch.float16, torch.bfloat16})
    drawing = drawer(family, torch.float32, decoding=dtype)
    for seeds in ([3, 4], [5]):
        assert are_right(drawn(drawing, seeds), seeds)
    assert family.loaded == [dtype, torch.float32]
    assert capfd.readouterr().err.count("the VAE overflows in") == 1


HALVES = {torch.float16, torch.bfloat16}
EVERYTHING = {*HALVES, torch.float32}


@pytest.mark.parametrize(
    ("overflows", "wider"),
    [
        ({"denoiser_overflows": HALVES}, torch.bfloat16),
        ({"denoiser_overflows": {torch.float16}}, None),
        ({"vae_overflows": EVERYTHING}, torch.bfloat16),
    ],
)
def test_what_is_no_number_in_the_wider_precision_either_is_refused(overflows, wider):
    with pytest.raises(UserError, match="no numbers"):
        drawn(drawer(Family(**overflows), wider=wider), [0])


@pytest.mark.parametrize("makes_way", [True, False])
def test_a_vae_that_does_not_fit_beside_the_denoiser_decodes_without_it_and_else_in_tiles(monkeypatch, makes_way):
    moved = []
    monkeypatch.setattr(Network, "to", lambda self, where: moved.append(str(where)) or self)
    family = Family()
    drawing = drawer(family, makes_way=makes_way)
    drawing._decoder._vae.to = lambda where: None
    family.fits = lambda: family.tiled or moved.count("cpu") % 2 == 1
    assert are_right(drawn(drawing, [1, 2]), [1, 2])
    assert family.tiled is not makes_way
    assert moved == (["cpu", "cpu"] if makes_way else ["cpu"]), "away, and back to a device of that name"


def test_a_picture_that_does_not_even_fit_in_tiles_is_out_of_memory():
    with pytest.raises(torch.OutOfMemoryError):
        drawn(drawer(Family(fits=lambda: False)), [1])


@pytest.mark.parametrize(
    ("compute", "on_a_gpu"),
    [
        ("bf16", (torch.float16, torch.bfloat16)),
        ("fp16", (torch.float16, torch.float32)),
        ("fp32", (torch.float32, None)),
    ],
)
def test_pictures_are_drawn_in_the_finer_of_two_half_precisions(monkeypatch, compute, on_a_gpu):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert picture_dtypes(compute, torch.device("cuda")) == on_a_gpu
    assert picture_dtypes(compute, torch.device("cpu"))[1] is None
