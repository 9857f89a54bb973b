import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lowvram_db.cache import Framing, View
from lowvram_db.framing import to_float

side = st.integers(1, 300)
DIGEST = "0123456789abcdef" * 4


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@settings(max_examples=40)
@given(width=side, height=side, size=st.sampled_from([(8, 8), (64, 64), (80, 48), (48, 80)]))
def test_the_plain_view_is_pillows_own_fit(width, height, size):
    photo = noise(width, height)
    wanted = ImageOps.fit(photo, size, Image.Resampling.LANCZOS)
    assert np.array_equal(View.of(photo.size, size).pixels(photo).permute(1, 2, 0), np.asarray(wanted))


def test_the_plain_view_is_the_middle():
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste("white", (100, 0, 200, 100))
    for photo in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        assert View.of(photo.size, (96, 96)).pixels(photo).min() > 192


def test_a_mirrored_view_is_the_other_one_mirrored():
    photo = noise(100, 70)
    plain, mirrored = (
        View((96, 96), (64, 64), (3.0, 2.0, 60.0, 59.0), mirror).pixels(photo) for mirror in (False, True)
    )
    assert torch.equal(plain.flip(2), mirrored)
    assert not torch.equal(plain, mirrored)


def test_floats_run_from_minus_one_to_one():
    pixels = to_float(torch.tensor([0, 127, 255], dtype=torch.uint8))
    assert pixels.tolist() == pytest.approx([-1.0, 127 / 127.5 - 1, 1.0], abs=1e-7)


@pytest.mark.parametrize(
    ("resolution", "multiple", "wanted"),
    [
        (512, 64, {(512, 512), (576, 448), (640, 384), (768, 320)}),
        (64, 16, {(64, 64), (80, 48)}),
        (768, 64, {(768, 768), (832, 704), (896, 640), (1024, 576), (1152, 512), (1280, 448)}),
        (8, 16, {(8, 8)}),
    ],
)
def test_the_buckets(resolution, multiple, wanted):
    buckets = Framing(resolution, "buckets", multiple=multiple).buckets
    assert set(buckets) == wanted | {(height, width) for width, height in wanted}


@given(resolution=st.sampled_from([256, 320, 512, 640, 768, 1024, 1536]))
def test_buckets_are_near_the_squares_area_and_divisible(resolution):
    for width, height in Framing(resolution, "buckets").buckets:
        assert width % 64 == height % 64 == 0
        assert resolution**2 - 64 * min(width, height) < width * height <= resolution**2
        assert max(width, height) <= 3 * min(width, height)


@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_a_photo_gets_the_nearest_ratio(width, height):
    framing = Framing(512, "buckets")
    chosen = framing.size((width, height))
    factor = max(chosen[0] / chosen[1] * height / width, width / height * chosen[1] / chosen[0])
    for other in framing.buckets:
        assert factor <= max(other[0] / other[1] * height / width, width / height * other[1] / other[0]) * (1 + 1e-12)
    assert Framing(512).size((width, height)) == (512, 512)


@given(width=side, height=side, seed=st.integers(0, 2**63 - 1), crop=st.sampled_from(["square", "buckets"]))
def test_variants_stay_inside_the_photo_and_keep_their_shape(width, height, seed, crop):
    framing = Framing(64, crop, variants=6, flip=True, seed=seed, multiple=16)
    views = framing.views((width, height), DIGEST)
    assert views == framing.views((width, height), DIGEST)
    assert views[0] == View.of((width, height), framing.size((width, height)))
    assert [view.mirrored for view in views] == [False, True] * 3
    for view in views:
        left, top, right, bottom = view.box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert math.isclose((right - left) / (bottom - top), view.size[0] / view.size[1], rel_tol=1e-9)
        assert view.pixels(noise(width, height)).shape == (3, view.size[1], view.size[0])


def test_variants_differ_by_number_by_photo_and_by_seed():
    def boxes(seed, digest):
        return [view.box for view in Framing(64, variants=50, seed=seed).views((96, 96), digest)]

    assert len(set(boxes(0, DIGEST))) == 50
    assert not set(boxes(0, DIGEST)[1:]) & set(boxes(1, DIGEST)[1:])
    assert not set(boxes(0, DIGEST)[1:]) & set(boxes(0, DIGEST[1:] + "0")[1:])
    zooms = [96 / (right - left) for left, _, right, _ in boxes(0, DIGEST)[1:]]
    assert 1.0 < min(zooms) < 1.02 and 1.13 < max(zooms) < 1.15


def test_without_flip_nothing_is_mirrored():
    assert not any(view.mirrored for view in Framing(64, variants=9).views((96, 96), DIGEST))


@given(
    photo=st.tuples(st.integers(100, 4000), st.integers(100, 4000)),
    edges=st.tuples(*[st.floats(0, 1)] * 4),
    crop=st.sampled_from(["square", "buckets", "subject"]),
    variants=st.integers(1, 3),
)
def test_nothing_outside_of_a_crop_box_is_seen(photo, edges, crop, variants):
    (left, right), (top, bottom) = sorted(edges[:2]), sorted(edges[2:])
    box = (left * (photo[0] - 20), top * (photo[1] - 20), right * (photo[0] - 20) + 20, bottom * (photo[1] - 20) + 20)
    framing = Framing(512, crop, variants, centre=1 / 3)
    for view in framing.views(photo, "0" * 64, box):
        assert box[0] <= view.box[0] < view.box[2] <= box[2] and box[1] <= view.box[1] < view.box[3] <= box[3]
        assert view.photo == photo and view.size in framing.buckets


@pytest.mark.parametrize(
    "photo, box",
    [
        ((400, 1200), (0, 200, 400, 600)),  # around a third of 1200
        ((400, 500), (0, 0, 400, 400)),  # as far up as the photo reaches
        ((600, 400), (100, 0, 500, 400)),  # in the middle across
    ],
)
def test_people_are_seen_around_the_upper_third(photo, box):
    assert Framing(64, "subject", centre=1 / 3).views(photo, "")[0].box == pytest.approx(box)
    middle = Framing(64, "subject").views(photo, "")
    assert middle == Framing(64).views(photo, "") == [View.of(photo, (64, 64))]
