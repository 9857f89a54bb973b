import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lowvram_db.errors import UserError
from lowvram_db.photos import find_photos, load_photo

RED = (200, 30, 40)


def is_red(photo, tolerance=12):
    centre = np.asarray(photo)[photo.height // 2, photo.width // 2]
    return photo.mode == "RGB" and np.abs(centre.astype(int) - RED).max() <= tolerance


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "png"), ("RGB", "jpg"), ("RGB", "webp"), ("RGB", "bmp"), ("CMYK", "jpg"), ("CMYK", "tif"),
     ("P", "png"), ("P", "gif"), ("RGBA", "png"), ("YCbCr", "jpg"), ("RGBX", "tif")],
)  # fmt: skip
def test_every_colour_mode_keeps_its_colour(tmp_path, mode, suffix):
    path = tmp_path / f"photo.{suffix}"
    Image.new("RGB", (40, 30), RED).convert(mode).save(path)
    assert is_red(load_photo(path), tolerance=25)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
def test_grey_of_any_depth_keeps_its_brightness(tmp_path, dtype):
    full_scale = {"uint8": 255, "uint16": 65535, "int32": 65535, "float32": 1.0}[dtype]
    ramp = np.linspace(0, 1, 64)[None, :].repeat(8, 0) * full_scale
    path = tmp_path / "grey.tif"
    Image.fromarray(ramp.astype(dtype)).save(path)
    photo = np.asarray(load_photo(path)).astype(float)
    assert photo.shape == (8, 64, 3)
    assert np.abs(photo[0, :, 0] - np.linspace(0, 255, 64)).max() <= 1


def test_16_bit_png_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "grey.png")
    assert np.asarray(load_photo(tmp_path / "grey.png"))[0, 0, 0] == 128


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(tmp_path, mode):
    path = tmp_path / "clear.png"
    if mode == "P":
        image = Image.new("P", (8, 8), 3)
        image.putpalette([0, 0, 0] * 3 + list(RED))
        image.info["transparency"] = 3
        image.save(path, transparency=3)
    else:
        Image.new(mode, (8, 8), 0).save(path)
    assert np.asarray(load_photo(path)).min() == 255


def test_half_transparent_is_mixed_with_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 51)).save(tmp_path / "veil.png")
    assert abs(int(np.asarray(load_photo(tmp_path / "veil.png"))[0, 0, 0]) - 204) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """An upright picture, stored as each camera orientation would store it, comes back upright."""
    upright = Image.new("RGB", (60, 40), "black")
    upright.paste(RED, (0, 0, 20, 20))  # top left
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes each orientation
    stored = upright.transpose(Image.Transpose(inverse[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    photo = load_photo(tmp_path / "turned.png")
    assert photo.size == upright.size
    assert np.array_equal(np.asarray(photo), np.asarray(upright))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, (0, 0, 255), (0, 255, 0))]
    for suffix in ("gif", "webp", "png"):
        path = tmp_path / f"moving.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
        assert is_red(load_photo(path), tolerance=25), suffix


def encoded(kind):
    buffer = io.BytesIO()
    Image.merge("RGB", [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.new("L", (256, 256), 9)]).save(
        buffer, kind
    )
    return buffer.getvalue()


PNG, JPEG = encoded("PNG"), encoded("JPEG")
BAD_FILES = {
    "text.jpg": b"this is a text file",
    "empty.jpg": b"",
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "truncated.png": PNG[: len(PNG) // 2],
    "header.png": PNG[:30],
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(BAD_FILES[name])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_photo(tmp_path / name)


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_bytes_never_end_in_a_traceback(tmp_path_factory, data):
    content = bytearray(data.draw(st.sampled_from([PNG, JPEG])))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=10)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.img"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert load_photo(path).mode == "RGB"
    except UserError as error:
        assert "damaged.img" in str(error)


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png: is not there any more; bring it back"):
        load_photo(tmp_path / "gone.png")
    with pytest.raises(UserError, match=rf"{tmp_path.name}: cannot be read \(Is a directory\)"):
        load_photo(tmp_path)


def test_too_many_pixels_are_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"huge\.png: has too many pixels"):
        load_photo(tmp_path / "huge.png")


def test_find_photos_sorts_and_passes_over_other_files(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "Thumbs.db"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [photo.name for photo in find_photos(tmp_path, "subject.photos")] == ["a.JPG", "b.png"]


def test_find_photos_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"subject\.photos: .*nowhere does not exist"):
        find_photos(tmp_path / "nowhere", "subject.photos")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match="is a file; give the folder"):
        find_photos(tmp_path / "photo.jpg", "subject.photos")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no photos in .*empty"):
        find_photos(tmp_path / "empty", "subject.photos")
    (tmp_path / "IMG_1.HEIC").touch()
    with pytest.raises(UserError, match=r"IMG_1\.HEIC.*convert it to JPEG"):
        find_photos(tmp_path, "subject.photos")


def test_real_photos_load(dog_photos):
    for photo in find_photos(dog_photos, "subject.photos"):
        pixels = np.asarray(load_photo(photo))
        assert pixels.shape[2] == 3
        assert 10 < pixels.std() < 128
