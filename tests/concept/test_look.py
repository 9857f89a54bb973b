import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from lowvram_db.concept.look import detail, look, perceptual_hash, tell
from lowvram_db.errors import UserError


def picture(number, size=(300, 260)):
    """Coarse shapes and fine grain, of each number others."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    grain = generator.normal(0, 12, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


@pytest.fixture
def found(tmp_path):
    def found(resolution=256, **pictures):
        for name, image in pictures.items():
            image.save(tmp_path / f"{name}.png")
        photos = [tmp_path / f"{name}.png" for name in pictures]
        return [(finding.where, finding.what) for finding in look(photos, resolution)]

    return found


GOOD = {f"g{number}": picture(number) for number in range(3)}


def test_nothing_is_said_of_good_photos(found):
    assert found(**GOOD) == []


CASES = {
    "small": (picture(7, (150, 128)), "150 x 128 is small: enlarged 2.0 times to 256"),
    "long": (picture(7, (1200, 300)), "1200 x 300 is long: 75% of it are cut off by a square"),
    "blurred": (picture(7).filter(ImageFilter.GaussianBlur(6)), "is blurred: what is learnt from it will be, too"),
    "scaled": (GOOD["g1"].resize((600, 520)), "is nearly the same as g1.png, and counts twice"),
    "brighter": (ImageEnhance.Brightness(GOOD["g1"]).enhance(1.15), "is nearly the same as g1.png, and counts twice"),
}


@pytest.mark.parametrize("image, words", CASES.values(), ids=CASES)
def test_what_a_photo_has_is_said(found, image, words):
    assert found(**GOOD, other=image) == [("other.png", words)]


def test_what_was_sent_by_phone_is_the_same_picture(tmp_path):
    """Small, and with little left of its colours: bits of the hash change with it."""
    for name, image in GOOD.items():
        image.save(tmp_path / f"{name}.png")
    picture(1).resize((200, 173)).save(tmp_path / "sent.jpg", quality=4)
    sent = [finding for finding in look(sorted(tmp_path.iterdir()), 128) if finding.where == "sent.jpg"]
    assert [finding.what for finding in sent] == ["is nearly the same as g1.png, and counts twice"]
    with Image.open(tmp_path / "sent.jpg") as image:
        assert perceptual_hash(image) != perceptual_hash(GOOD["g1"])


def test_class_images_are_looked_at_likewise(tmp_path):
    """And beside the photos, which should not be among them."""
    (tmp_path / "dogs").mkdir()
    for name, image in GOOD.items():
        image.save(tmp_path / f"{name}.png")
    shown = {
        "a": picture(8),
        "b": picture(8, (600, 520)),
        "c": ImageEnhance.Brightness(GOOD["g2"]).enhance(1.1),
        "d": picture(9, (150, 128)),
    }
    for name, image in shown.items():
        image.save(tmp_path / "dogs" / f"{name}.png")
    findings = look(sorted(tmp_path.glob("*.png")), 256, sorted((tmp_path / "dogs").iterdir()))
    assert [(finding.where, finding.what) for finding in findings] == [
        ("dogs/d.png", "150 x 128 is small: enlarged 2.0 times to 256"),
        ("dogs/c.png", "is nearly the same as g2.png, and would teach the subject as any of its class"),
        ("dogs/b.png", "is nearly the same as dogs/a.png, and counts twice"),
    ]
    assert all(finding.is_warning for finding in findings)


def test_of_many_alike_a_few_are_named(tmp_path, capfd):
    """Each as often as it is odd: of four copies three are too many."""
    for number in range(5):
        picture(5, (150, 128)).save(tmp_path / f"{number}.png")
    findings = look(sorted(tmp_path.iterdir()), 256)
    assert len(findings) == 5 + 4
    assert all("the same as 0.png" in finding.what for finding in findings[5:])
    with pytest.raises(UserError, match=r"0\.png: 150 x 128 is small.* \(9 warnings\)"):
        tell(findings, strict=True)
    lines = [line.strip().split("  ", 1) for line in capfd.readouterr().err.splitlines()]
    assert [(where, what.strip()[:12]) for where, what in lines] == [
        *((f"{number}.png", "150 x 128 is") for number in (0, 1, 2)),
        ("2 more", "small"),
        *((f"{number}.png", "is nearly th") for number in (1, 2, 3)),
        ("1 more", "nearly the s"),
    ]


def test_few_photos_and_turned_ones_are_said(tmp_path, capfd):
    exif = Image.Exif()
    exif[0x0112] = 6
    GOOD["g0"].save(tmp_path / "a.png", exif=exif)
    findings = look([tmp_path / "a.png"], 256)
    assert [finding.is_warning for finding in findings] == [True, False]
    tell(findings)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("  subject.photos  1 is few") and "a.png           is turned upright" in lines[1]
    tell(findings[1:], strict=True)
    with pytest.raises(UserError, match=r"--strict: subject\.photos: 1 is few.*; mend it, or train without --strict"):
        tell(findings, strict=True)


def test_a_photo_with_more_text_than_pillow_opens_is_looked_at_as_it_is_trained_on(tmp_path):
    """Editors and picture generators write such."""
    exif = Image.Exif()
    exif[0x0112] = 6
    GOOD["g0"].save(tmp_path / "a.png", exif=exif)
    png = (tmp_path / "a.png").read_bytes()
    text = b"zTXt" + b"parameters\0\0" + zlib.compress(b"x" * 1_200_000)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    (tmp_path / "a.png").write_bytes(png[:33] + chunk + png[33:])
    with pytest.raises(ValueError, match="too large"):
        Image.open(tmp_path / "a.png")
    assert [finding.kind for finding in look([tmp_path / "a.png"], 256)] == ["few", "turned"]


def test_real_photos_of_one_dog_are_sharp_and_no_two_are_the_same(dog_photos):
    assert look(sorted(dog_photos.glob("*.jpg")), 512) == []


def test_hash_and_detail_are_of_the_picture_and_not_of_its_size():
    one = picture(3, (512, 512))
    assert (perceptual_hash(one) ^ perceptual_hash(one.resize((128, 128)))).bit_count() <= 2
    assert (perceptual_hash(one) ^ perceptual_hash(picture(4, (512, 512)))).bit_count() > 12
    assert (
        detail(one) > detail(one.filter(ImageFilter.GaussianBlur(2))) > detail(one.filter(ImageFilter.GaussianBlur(8)))
    )
    assert detail(Image.new("RGB", (300, 300), "red")) == 1
