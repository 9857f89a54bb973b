"""What would else be found when everything is encoded is named before anything is drawn."""

import json

import pytest
import torch
from PIL import Image

from lowvram_db import dreambooth, encoding
from lowvram_db.errors import UserError


def spotted(size=(96, 64), place=(0, 0)):
    """A mask that is black but for a pixel."""
    mask = Image.new("L", size, 0)
    mask.putpixel(place, 255)
    return mask


BAD = {
    "black": (Image.new("L", (96, 64), 0), None, {}, r"a\.mask\.png: is black everywhere; white is the subject: paint"),
    "turned": (Image.new("L", (64, 96), 255), None, {}, r"a\.mask\.png: is 64 x 96, its photo 96 x 64; make it of"),
    "cut off": (spotted(), None, {"mask_weight": 0.0}, r"a\.mask\.png: shows no subject where the photo is cut; set"),
    "in a crop": (spotted(), [8, 8, 72, 64], {"mask_weight": 0.0}, r"a\.mask\.png: shows no subject where the photo"),
    "too little for a latent": (spotted((384, 256), (190, 130)), None, {"mask_weight": 0.0}, r"shows no subject where"),
    "no picture": (b"no picture", None, {}, r"a\.mask\.png: not an image that Pillow can read"),
    "crop": (None, [0, 0, 97, 64], {}, r"a\.jpg: its crop ends at 97, 64, and the upright photo is 96 x 64; mend it"),
}


@pytest.mark.parametrize("mask, crop, train, words", BAD.values(), ids=BAD)
def test_bad_masks_and_crops_are_named_before_a_run(make_config, tmp_path, monkeypatch, mask, crop, train, words):
    folder = tmp_path / "masked"
    folder.mkdir()
    Image.effect_noise((96, 64), 99).save(folder / "a.jpg")
    if isinstance(mask, Image.Image):
        mask.save(folder / "a.mask.png")
    elif mask:
        (folder / "a.mask.png").write_bytes(mask)
    if crop:
        (folder / "captions.jsonl").write_text(json.dumps({"file_name": "a.jpg", "crop": crop}))
    for later in ("check_prediction", "_concept"):
        monkeypatch.setattr(dreambooth, later, lambda *_: pytest.fail("began"))
    with pytest.raises(UserError, match=words):
        dreambooth.run_dreambooth(make_config(subject={"photos": str(folder)}, train=train))


@pytest.mark.parametrize(
    ("crop", "noun", "centre"),
    [("subject", "Woman", 1 / 3), ("subject", "dog", 0.5), ("square", "woman", 0.5), ("buckets", "woman", 0.5)],
)
def test_people_are_cut_around_the_upper_third_where_that_is_wanted(
    make_config, family, monkeypatch, crop, noun, centre
):
    monkeypatch.setattr(encoding, "precompute", lambda *_, framing, **how: framing)
    config = make_config(subject={"class": noun}, train={"crop": crop})
    framing = encoding.encode(config, family, None, torch.device("cpu"), photos=[], prompts=[])
    assert (framing.crop, framing.centre) == (crop, centre)
