"""What masks make of the loss, beside masks that are cut and averaged by numpy alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lowvram_db.concept.masks import load_mask, loss_weights
from lowvram_db.framing import View
from lowvram_db.photos import find_photos, mask_of


@given(
    data=st.data(),
    rest=st.sampled_from([0.0, 0.25, 1.0]),
    x=st.integers(0, 4),
    y=st.integers(0, 4),
    mirrored=st.booleans(),
    larger=st.sampled_from([1, 2]),
)
def test_a_latent_counts_as_much_as_its_square_of_the_mask_is_white(data, rest, x, y, mirrored, larger):
    """Views of whole latents, which a mean over squares of 8 pixels gives exactly; masks of twice the photo's size."""
    seed = data.draw(st.integers(0, 999))
    mask = np.random.default_rng(seed).integers(0, 2, (96, 96)).astype(np.uint8) * 255
    left, top = 8 * x, 8 * y
    view = View((96, 96), (64, 64), (left, top, left + 64, top + 64), mirrored)
    image = Image.fromarray(mask.repeat(larger, 0).repeat(larger, 1))
    got = loss_weights(image, view, (8, 8), rest, "m")
    white = mask[top : top + 64, left : left + 64].reshape(8, 8, 8, 8).mean((1, 3)) / 255
    wanted = rest + (1 - rest) * (white[:, ::-1] if mirrored else white)
    np.testing.assert_allclose(got.numpy(), wanted / wanted.mean(), atol=0.02)
    assert got.mean().item() == pytest.approx(1, abs=1e-5)


@pytest.fixture
def masked(tmp_path):
    folder = tmp_path / "masked"
    folder.mkdir()

    def write(mask, name="a.mask.png"):
        Image.effect_noise((96, 64), 99).save(folder / "a.jpg")
        mask.save(folder / name)
        return folder

    return write


@pytest.mark.parametrize("name", ["a.mask.png", "a.jpg.mask.png"])
def test_a_mask_is_no_photo_and_belongs_to_one(masked, name, capsys):
    folder = masked(Image.new("L", (96, 64), 255), name)
    Image.new("L", (9, 9)).save(folder / "lost.mask.png")
    photos = find_photos(folder, "subject.photos")
    assert [photo.name for photo in photos] == ["a.jpg"]
    assert mask_of(photos[0]) == folder / name
    assert "1 masks of no photo that is there (lost.mask.png)" in capsys.readouterr().err


def test_a_mask_that_shows_nothing_weighs_all_alike():
    """Where what it shows is cut off, and what it does not show counts."""
    corner = Image.new("L", (96, 64), 0)
    corner.putpixel((0, 0), 255)
    view = View.of((96, 64), (64, 64))
    torch.testing.assert_close(loss_weights(corner, view, (8, 8), 0.1, "m"), torch.ones(8, 8))


def test_masks_of_any_mode_are_read(masked):
    for mode, white in (("1", 1), ("RGB", (255, 255, 255)), ("I;16", 65535)):
        folder = masked(Image.new(mode, (96, 64), white))
        assert load_mask(folder / "a.mask.png").getextrema() == (255, 255)


def test_where_nothing_is_painted_is_no_subject(masked):
    """As programs save it that paint the subject in white on a layer of its own."""
    painted = Image.new("RGBA", (96, 64), (255, 255, 255, 0))
    painted.paste((255, 255, 255, 255), (0, 0, 48, 64))
    read = np.asarray(load_mask(masked(painted) / "a.mask.png"))
    assert (read[:, :48] == 255).all() and (read[:, 48:] == 0).all()
