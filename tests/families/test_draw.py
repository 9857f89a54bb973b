from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lowvram_db.demo.miniature import write_sdxl
from lowvram_db.errors import UserError
from lowvram_db.families import open_model
from lowvram_db.families.base import NO_PROMPT
from lowvram_db.families.conditioning import collated
from lowvram_db.families.draw import Drawer, Wanted, drawer_for
from lowvram_db.families.text import encoded
from lowvram_db.memory.device import pick_device, picture_dtypes
from lowvram_db.memory.only_read import OnlyRead

CPU = torch.device("cpu")
HOW = {"steps": 1, "resolution": 4}
NO_GPU = {"condition": not torch.cuda.is_available(), "reason": "wants a GPU"}


class Network(nn.Module):
    """Something that lies somewhere in some precision."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.use_tiling, self.tile_sample_min_size, self.tile_latent_min_size = False, 512, 64

    def enable_tiling(self):
        self.use_tiling = True

    @property
    def dtype(self):
        return self.weight.dtype


class Family:
    """Latents are the first numbers of their generators; what the denoiser or the VAE gives in the precisions that are
    named is no number, in one picture of those that are made together."""

    folder = "model"

    def __init__(self, denoiser_overflows=(), vae_overflows=(), fits=lambda: True):
        self.denoiser_overflows, self.vae_overflows, self.fits = denoiser_overflows, vae_overflows, fits
        self.loaded = []

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

    def decode_latents(self, vae, latents):
        assert len(latents) == 1, "more than one picture at once"
        if not self.fits():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return torch.full_like(latents, torch.inf) if vae.dtype in self.vae_overflows else latents * 2 - 1


def drawer(family, dtype=torch.float16, is_own=True, **how):
    network = Network(dtype)
    own = OnlyRead(network, CPU, "pictures") if is_own else None
    return Drawer(family, network, CPU, dtype, at_once=4, own=own, **how)


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
    drawing = drawer(family, torch.float32, is_own=False, decoding=dtype)
    for seeds in ([3, 4], [5]):
        assert are_right(drawn(drawing, seeds), seeds)
    assert family.loaded == [dtype, torch.float32]
    assert capfd.readouterr().err.count("the VAE overflows in") == 1


HALVES = {torch.float16, torch.bfloat16}
EVERYTHING = {*HALVES, torch.float32}


@pytest.mark.parametrize(
    ("overflows", "how"),
    [
        ({"denoiser_overflows": HALVES}, {"wider": torch.bfloat16}),
        ({"denoiser_overflows": {torch.float16}}, {"wider": None}),
        ({"denoiser_overflows": {torch.float16}}, {"wider": torch.bfloat16, "is_own": False}),
        ({"vae_overflows": EVERYTHING}, {"wider": torch.bfloat16}),
    ],
)
def test_what_is_no_number_in_the_wider_precision_either_is_refused(overflows, how):
    with pytest.raises(UserError, match="no numbers"):
        drawn(drawer(Family(**overflows), **how), [0])


@pytest.mark.parametrize("is_own", [True, False])
def test_a_vae_that_does_not_fit_beside_the_denoiser_decodes_without_it_and_else_in_tiles(monkeypatch, is_own, capfd):
    """Smaller ones, where those that it was made for are no smaller than the picture."""
    moved = []
    monkeypatch.setattr(Network, "to", lambda self, where: moved.append(str(where)) or self)
    family = Family()
    drawing = drawer(family, is_own=is_own)
    vae = drawing._decoder._vae
    vae.to = lambda where: None
    moved.clear()
    family.fits = lambda: vae.tile_sample_min_size == 256 or moved.count("cpu") % 2 == 1
    assert are_right(drawn(drawing, [1, 2]), [1, 2])
    assert vae.use_tiling is not is_own
    assert capfd.readouterr().err.count("pictures: out of memory; decoded in tiles") == (0 if is_own else 2)
    assert moved == (["cpu", "cpu"] if is_own else []), "away, and back to a device of that name"


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


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."
SAID = "pictures: out of memory; the denoiser's weights pass through from RAM from here on"


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    write_sdxl(folder)
    return open_model(str(folder))


def told(family, device):
    return collated([of_one for _, of_one in encoded(family, ["a ball", NO_PROMPT], device, torch.float32)])


def pictures(drawer, conditioning):
    return [
        np.asarray(picture)
        for picture in drawer.draw(conditioning, [Wanted(seed, 7.0) for seed in range(3)], steps=2, resolution=64)
    ]


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(**NO_GPU))])
@pytest.mark.parametrize("name", ["family", "sdxl"])
def test_pictures_by_weights_from_ram_are_those_by_weights_on_the_device(name, where, request, delayed):
    delayed(0)
    family, device = request.getfixturevalue(name), pick_device() if where == "cuda" else CPU
    conditioning = told(family, device)
    resident, streamed = (drawer_for(family, "fp32", device, 2, streamed=streamed) for streamed in (False, True))
    for one, other in zip(pictures(resident, conditioning), pictures(streamed, conditioning), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("streamed", [False, True])
def test_one_picture_that_does_not_fit_takes_its_weights_from_ram_and_then_more_at_once(
    family, streamed, delayed, capfd
):
    """It is drawn again from its own noise, be the memory full in the middle of a step."""
    delayed(0)
    conditioning, together = told(family, CPU), []
    wanted = pictures(drawer_for(family, "fp32", CPU, 1), conditioning)
    drawing = drawer_for(family, "fp32", CPU, 2, streamed=streamed)

    def fits(_, args, __):
        together.append(len(args[0]) // 2)
        if together[-1] > 1 or not drawing._own.is_streamed:
            raise torch.OutOfMemoryError(FULL)

    drawing._denoiser.mid_block.register_forward_hook(fits)
    for one, other in zip(pictures(drawing, conditioning), wanted, strict=True):
        assert np.array_equal(one, other)
    steps = [1] * 6
    assert together == ([2, *steps] if streamed else [2, 1, 2, *steps])
    said = capfd.readouterr().err
    assert said.count(SAID) == (not streamed)
    assert said.count("pictures: out of memory; 1 at once from here on") == (1 if streamed else 2)


@pytest.mark.parametrize("is_own", [False, True])
def test_a_denoiser_that_is_somebodys_or_is_streamed_already_goes_no_further(family, is_own):
    """As the one in training."""
    drawing = Drawer(family, family.load_denoiser(), CPU, torch.float32, 1)
    if is_own:
        drawing = drawer_for(family, "fp32", CPU, 1, streamed=True)

    def full(*_):
        raise torch.OutOfMemoryError(FULL)

    drawing._denoiser.mid_block.register_forward_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        pictures(drawing, told(family, CPU))


def test_one_that_is_streamed_and_overflows_is_streamed_in_the_wider_precision(family, delayed, monkeypatch, capfd):
    delayed(0)
    conditioning = told(family, CPU)
    monkeypatch.setattr("lowvram_db.families.draw.picture_dtypes", lambda *_: (torch.float16, torch.float32))
    overflows, streamed = (drawer_for(family, "fp16", CPU, 2, streamed=streamed) for streamed in (False, True))
    for drawing in (overflows, streamed):
        drawing._decoder._vae.float()
        drawing._denoiser.conv_out.register_forward_hook(
            lambda _, __, out: out * (torch.inf if out.dtype == torch.float16 else 1)
        )
    for one, other in zip(pictures(overflows, conditioning), pictures(streamed, conditioning), strict=True):
        assert np.array_equal(one, other)
    assert streamed._own.is_streamed and not overflows._own.is_streamed
    assert capfd.readouterr().err.count("overflows in fp16: its pictures are drawn in float32 from here on") == 2
