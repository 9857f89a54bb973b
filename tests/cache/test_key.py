import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from lowvram_db.cache import View, key
from lowvram_db.cache.key import encoder_digest, latent_key, pixels_digest, text_key, weights_digest
from lowvram_db.families.tiles import MOST

PHOTO = (96, 96)
VIEW = View(PHOTO, (64, 64), (0.0, 0.0, 96.0, 96.0))
LATENT = {"pixels": "p", "view": VIEW, "encoder": "vae", "dtype": "float32", "tiled": 0}
OTHERS = {
    "pixels": "q",
    "view": View(PHOTO, (64, 64), (0.0, 0.0, 96.0, 95.99999999999999)),
    "encoder": "vae 2",
    "dtype": "float16",
    "tiled": 1,
}


@pytest.mark.parametrize("part", LATENT)
def test_a_latents_key_depends_on_every_part(part):
    assert len({latent_key(**LATENT | {"tiled": times}) for times in range(MOST + 1)}) == MOST + 1
    assert latent_key(**LATENT) == latent_key(**LATENT)
    assert latent_key(**LATENT | {part: OTHERS[part]}) != latent_key(**LATENT)


@pytest.mark.parametrize(
    "view",
    [View(PHOTO, (64, 48), VIEW.box), View(PHOTO, (48, 64), VIEW.box), View(PHOTO, (64, 64), VIEW.box, mirrored=True),
     View(PHOTO, (64, 64), (1.0, 0.0, 96.0, 96.0))],
)  # fmt: skip
def test_every_part_of_a_view_counts(view):
    assert latent_key(**LATENT | {"view": view}) != latent_key(**LATENT)


def test_keys_of_another_format_are_others(monkeypatch):
    before = latent_key(**LATENT), text_key("a", "b", "c")
    monkeypatch.setattr(key, "FORMAT_VERSION", 99)
    assert not {latent_key(**LATENT), text_key("a", "b", "c")} & set(before)


parts = st.tuples(st.text(max_size=4), st.text(max_size=4), st.text(max_size=4))


@given(one=parts, other=parts)
def test_texts_that_differ_have_keys_that_differ(one, other):
    assert (text_key(*one) == text_key(*other)) == (one == other)


def test_an_encoder_is_its_files_names_and_contents_in_order():
    digests = {
        encoder_digest(files)
        for files in ([("a", "1"), ("b", "2")], [("b", "2"), ("a", "1")], [("a", "1")], [("a", "12"), ("b", "")])
    }
    assert len(digests) == 4


WEIGHT = torch.arange(24.0).view(2, 3, 2, 2)


@pytest.mark.parametrize(
    "other",
    [
        {"a": WEIGHT, "c": WEIGHT},
        {"a": WEIGHT},
        {"a": WEIGHT, "b": WEIGHT.bfloat16()},
        {"a": WEIGHT, "b": WEIGHT.view(3, 2, 2, 2)},
        {"a": WEIGHT, "b": WEIGHT.flip(0)},
        {"a": WEIGHT, "b": torch.nextafter(WEIGHT, torch.tensor(99.0))},
    ],
)
def test_weights_are_their_names_dtypes_shapes_and_numbers(other):
    assert weights_digest(other) != weights_digest({"a": WEIGHT, "b": WEIGHT})


def test_how_weights_lie_in_memory_and_in_which_order_they_are_named_is_nothing():
    last = WEIGHT.to(memory_format=torch.channels_last)
    assert weights_digest({"b": last, "a": nn.Parameter(WEIGHT)}) == weights_digest({"a": WEIGHT, "b": WEIGHT})


def test_pixels_are_their_values_and_shape():
    values = np.arange(36, dtype=np.uint8)
    wide, tall = (Image.fromarray(values.reshape(shape)) for shape in ((2, 6, 3), (6, 2, 3)))
    assert pixels_digest(wide) == hashlib.sha256(b"6x2:" + bytes(range(36))).hexdigest()
    assert pixels_digest(wide) != pixels_digest(tall)
