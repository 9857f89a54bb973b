import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image

from lowvram_db.demo.miniature import write_pipeline, write_sd2, write_sdxl
from lowvram_db.errors import UserError
from lowvram_db.families import open_model
from lowvram_db.families.base import NO_PROMPT
from lowvram_db.families.conditioning import collated
from lowvram_db.families.draw import drawer_for
from lowvram_db.families.sd import StableDiffusion
from lowvram_db.families.text import encoded
from lowvram_db.sampling import parse_scales, sample_grid, sample_model

CPU = torch.device("cpu")
OPTIONS = {"guidance": [7.0, 11.0], "seeds": 2, "steps": 2, "resolution": 64}


def found_in(sheet, picture):
    """How far the nearest place of a sheet is from the picture, at the most in one pixel."""
    sheet, picture = (np.asarray(image).astype(int) for image in (sheet, picture))
    last = sheet[:, -len(picture[0]) - 4 : -4]  # of the last column
    tops = range(len(sheet) - len(picture) + 1)
    return min(np.abs(last[top : top + len(picture)] - picture).max() for top in tops)


ENDS_IN_NOISE = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
MODELS = {
    "SD 1": (write_pipeline, {}),
    "SD 2, v prediction": (write_sd2, {}),
    "SD 2, v prediction that ends in noise": (write_sd2, ENDS_IN_NOISE),
    "SDXL": (write_sdxl, {}),
    "SDXL, v prediction that ends in noise": (write_sdxl, ENDS_IN_NOISE),
}


@pytest.mark.parametrize("model", MODELS)
def test_pictures_are_those_of_diffusers_own_pipeline(tmp_path, model):
    """Of the folder, loaded by diffusers, with the solver that we draw with, and what Lin et al. want for a schedule
    that ends in noise: its last step, and guidance that keeps the contrast. Products of the same matrices can differ in
    their last bits, by where in memory a library has put them."""
    write, schedule = MODELS[model]
    write(tmp_path / "model", **schedule)
    prompts, out = ["a ball", "a pkblz box"], tmp_path / "grid.png"
    sample_model(str(tmp_path / "model"), prompts, out, compute="fp32", **OPTIONS | {"seeds": 1})

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing" if schedule == ENDS_IN_NOISE else "linspace"
    )
    rescale = {"guidance_rescale": 0.7} if schedule == ENDS_IN_NOISE else {}
    picture = pipeline(
        prompts[-1], guidance_scale=11.0, num_inference_steps=2, height=64, width=64,
        generator=torch.Generator().manual_seed(0), **rescale,
    ).images[0]  # fmt: skip
    assert found_in(Image.open(out), picture) <= 1


@pytest.mark.parametrize(
    ("model", "guidance", "at_once"),
    [
        ("SD 1", [7.0, 11.0], 4),
        ("SD 1", [7.0, 11.0], 3),  # of both scales, and then one more
        ("SD 2, v prediction", [0.0, 1.0, 7.3], 6),  # of which the first two are not guided alone
        ("SDXL, v prediction that ends in noise", [1.0, 7.3], 4),  # whose contrast is kept
    ],
)
def test_a_row_goes_through_together_as_far_as_is_allowed_and_its_pictures_are_the_same(
    tmp_path, model, guidance, at_once
):
    """With its neighbours in one batch one may round differently."""
    write, schedule = MODELS[model]
    write(tmp_path / "model", **schedule)
    family, grids, together = open_model(str(tmp_path / "model")), {}, []
    for count in (1, at_once):
        drawer = drawer_for(family, "fp32", CPU, count)
        drawer._denoiser.register_forward_pre_hook(lambda _, args: together.append(len(args[0])))
        known = dict(encoded(family, ["a ball", NO_PROMPT], CPU, torch.float32))
        grids[count] = sample_grid(
            drawer,
            ["a ball"],
            lambda wanted, known=known: collated([known[p] for p in wanted]),
            **OPTIONS | {"guidance": guidance},
        )
    assert max(together) == 2 * at_once
    for one, other in zip(grids[1].pictures.values(), grids[at_once].pictures.values(), strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1


def test_sample_model_writes_and_never_overwrites(miniature, tmp_path):
    out = tmp_path / "grid.png"
    options = OPTIONS | {"compute": "fp32"}
    sample_model(str(miniature), ["a ball"], out, **options)
    assert Image.open(out).format == "PNG"
    with pytest.raises(UserError, match=r"--out .*grid\.png: exists already"):
        sample_model(str(miniature), ["a ball"], out, **options)


def test_a_model_that_does_not_fit_is_drawn_by_weights_from_ram(miniature, tmp_path, monkeypatch, delayed, capfd):
    delayed(0)
    load, options = StableDiffusion.load_denoiser, OPTIONS | {"compute": "fp32"}

    def too_large(*how):
        denoiser = load(*how)
        move, moves = denoiser.to, []

        def to(*where):
            moves.append(where)
            if len(moves) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return move(*where)

        denoiser.to = to
        return denoiser

    sample_model(str(miniature), ["a ball"], tmp_path / "fits.png", **options)
    monkeypatch.setattr(StableDiffusion, "load_denoiser", too_large)
    sample_model(str(miniature), ["a ball"], tmp_path / "does-not.png", **options)
    assert capfd.readouterr().err.count("pictures: out of memory; the denoiser's weights pass through from RAM") == 1
    fits, does_not = (Image.open(tmp_path / f"{name}.png").tobytes() for name in ("fits", "does-not"))
    assert does_not == fits


def test_the_models_own_resolution_is_the_default(miniature, tmp_path):
    options = OPTIONS | {"compute": "fp32", "resolution": None, "guidance": [7.0], "seeds": 1}
    sample_model(str(miniature), ["a ball"], tmp_path / "grid.png", **options)
    assert Image.open(tmp_path / "grid.png").width == 120 + 68


def test_bad_numbers_are_refused(miniature, tmp_path):
    assert parse_scales("7,11.5") == [7.0, 11.5]
    for text in ("", "seven", "7,", "-1", "inf", "nan"):
        with pytest.raises(UserError, match="--guidance"):
            parse_scales(text)
    with pytest.raises(UserError, match="--resolution 100: not divisible by 8"):
        sample_model(str(miniature), ["x"], tmp_path / "g.png", **(OPTIONS | {"compute": "fp32", "resolution": 100}))
