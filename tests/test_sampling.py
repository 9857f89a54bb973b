import numpy as np
import pytest
import torch
from PIL import Image

from lowvram_db.errors import UserError
from lowvram_db.families.draw import drawer_for
from lowvram_db.sampling import draw_grid, parse_scales, sample_grid, sample_model

OPTIONS = {"guidance": [7.0, 11.0], "seeds": 2, "steps": 2, "resolution": 64}


def colour(number):
    return Image.new("RGB", (64, 64), (40 * number, 0, 255 - 40 * number))


def test_the_grid_has_prompts_down_and_settings_across():
    rows = [[colour(0), colour(1), colour(2)], [colour(3), colour(4), colour(5)]]
    sheet = np.asarray(draw_grid(rows, ["one", "two"], ["a", "b", "c"]))
    places = {}
    for number in range(6):
        found = np.argwhere((sheet == (40 * number, 0, 255 - 40 * number)).all(-1))
        assert len(found) == 64 * 64, "a picture is covered or cut"
        places[number] = found.min(0)
    for number in (0, 1):
        assert places[number][0] == places[number + 1][0]
        assert places[number + 1][1] >= places[number][1] + 64
    assert places[3][0] >= places[0][0] + 64


def test_every_row_and_column_is_labelled():
    sheet = np.asarray(
        draw_grid([[colour(0), colour(1)]] * 2, ["a long prompt that has to be wrapped", "b"], ["c", "d"])
    )
    left = sheet[:, :100]
    rows_with_ink = (left < 128).any((1, 2))
    assert rows_with_ink.any()
    top = sheet[:16]
    assert (top[:, -68:] < 128).any()
    assert (top[:, -136:-68] < 128).any()


@pytest.mark.parametrize("side", [64, 512])
def test_a_long_prompt_is_not_cut(side):
    """The row grows with its label: ink of the last word is on the sheet."""
    picture = Image.new("RGB", (side, side))
    short = draw_grid([[picture]], ["word"], ["c"])
    long = draw_grid([[picture]], ["word " * 60], ["c"])
    assert long.height > short.height or side == 512
    assert long.width == short.width


@pytest.mark.parametrize("at_once", [2, 1])
def test_pictures_are_the_pipelines_own(family, at_once):
    """The grid holds what the pipeline draws from that prompt, scale and seed; with its neighbour seeds in one batch it
    may round differently."""
    pipeline, together = family.pipeline(), []
    drawer = drawer_for(family, "fp32", torch.device("cpu"), at_once)
    drawer._denoiser.register_forward_pre_hook(lambda _, args: together.append(len(args[0]) // 2))  # with guidance

    def text(prompts):
        with torch.no_grad():
            return family.encode_prompts({"text_encoder": pipeline.text_encoder}, prompts)

    grid = np.asarray(sample_grid(drawer, ["a ball", "a box"], text, **OPTIONS)).astype(int)
    assert set(together) == {at_once}
    picture = np.asarray(
        pipeline(
            "a box", guidance_scale=11.0, num_inference_steps=2, height=64, width=64,
            generator=torch.Generator().manual_seed(1),
        ).images[0]
    )  # fmt: skip
    width, far = 64 + 4, 0 if at_once == 1 else 1
    bottom, right = grid.shape[0] - 4, grid.shape[1] - 4
    assert grid.shape[1] == 120 + 4 * width
    last = grid[:, right - 64 : right]
    found = [top for top in range(bottom - 63) if np.abs(last[top : top + 64] - picture).max() <= far]
    assert len(found) == 1


def test_sample_model_writes_and_never_overwrites(miniature, tmp_path):
    out = tmp_path / "grid.png"
    options = OPTIONS | {"compute": "fp32"}
    sample_model(str(miniature), ["a ball"], out, **options)
    assert Image.open(out).format == "PNG"
    with pytest.raises(UserError, match=r"--out .*grid\.png: exists already"):
        sample_model(str(miniature), ["a ball"], out, **options)


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
