import io
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from lowvram_db.errors import UserError
from lowvram_db.photos import find_photos, folders_below, list_photos, load_photo

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
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "mpo"])
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    """An upright picture, stored as each camera orientation would store it, comes back upright."""
    upright = Image.new("RGB", (64, 32), "black")
    upright.paste(RED, (0, 0, 16, 16))  # top left
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that undoes each orientation
    stored = upright.transpose(Image.Transpose(inverse[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {
        "webp": {"lossless": True},
        "jpg": {"quality": 100, "subsampling": 0},
        "mpo": {"quality": 100, "subsampling": 0, "save_all": True, "append_images": [upright]},
    }
    stored.save(tmp_path / f"turned.{suffix}", exif=exif, **options.get(suffix, {}))
    photo = load_photo(tmp_path / f"turned.{suffix}")
    assert photo.size == upright.size
    assert np.abs(np.asarray(photo).astype(int) - np.asarray(upright)).max() <= (2 if suffix in ("jpg", "mpo") else 0)


@pytest.mark.parametrize(
    "odd",
    [(0x0103, 9, 1, -5), (0x011A, 5, 1, 4), (0x010F, 2, -1, 0), (0x0128, 77, 1, 1), (0x8769, 4, 1, 0x7FFFFFFF)],
    ids=["below 0", "ratio of nothing", "count without end", "type that does not exist", "pointer to nowhere"],
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_odd_tags_do_not_keep_a_photo_from_being_turned(tmp_path, suffix, odd):
    """odd: tag, type, count and value of a field of EXIF."""
    path, flat = tmp_path / f"turned.{suffix}", Image.new("RGB", (40, 30), RED)
    if suffix == "tif":
        exif = Image.Exif()
        exif[0x0112], exif[0xC000] = 6, 1  # the latter becomes the odd one, which the pixels do not need
        flat.save(path, exif=exif)
        content = path.read_bytes()
        place = content.index(struct.pack("<HH", 0xC000, 3))
        tag = 0x8769 if odd[0] == 0x8769 else 0xC000
        path.write_bytes(content[:place] + struct.pack("<HHll", tag, *odd[1:]) + content[place + 12 :])
    else:
        fields = struct.pack("<HHll", *odd) + struct.pack("<HHLL", 0x0112, 3, 1, 6)
        flat.save(path, exif=b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + fields + b"\0" * 4)
    photo = load_photo(path)
    assert photo.size == (30, 40)
    assert is_red(photo)


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
WHOLE = [PNG, JPEG, *map(encoded, ["WEBP", "TIFF", "GIF", "BMP"])]
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


@settings(max_examples=100, derandomize=True)
@given(data=st.data())
def test_damaged_bytes_never_end_in_a_traceback(tmp_path_factory, data):
    content = bytearray(data.draw(st.sampled_from(WHOLE)))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=10)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.img"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert load_photo(path).mode == "RGB"
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "error",
    [struct.error("a"), OverflowError("b\nc"), ZeroDivisionError(), zlib.error("d"), RecursionError("e")],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_is_one_line(tmp_path, monkeypatch, error):
    def fail(_):
        raise error

    (tmp_path / "odd.png").write_bytes(PNG)
    monkeypatch.setattr(PngImageFile, "load", fail)
    with pytest.raises(UserError, match=r"odd\.png: damaged or cut off \([^\n]+\); replace or remove it$"):
        load_photo(tmp_path / "odd.png")


def test_any_length_of_text_is_no_damage(tmp_path):
    info = PngInfo()
    for number in range(40):  # 80 MiB in all, more than Pillow takes even in small pieces
        info.add_text(f"parameters {number}", "x" * (2 << 20), zip=True)
    info.add_itxt("XML:com.adobe.xmp", "y" * (2 << 20), zip=True)
    Image.new("RGB", (40, 30), RED).save(tmp_path / "much.png", pnginfo=info)
    assert is_red(load_photo(tmp_path / "much.png"))


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png: is not there any more; bring it back"):
        load_photo(tmp_path / "gone.png")
    with pytest.raises(UserError, match=rf"{tmp_path.name}: cannot be read \(Is a directory\)"):
        load_photo(tmp_path)


def test_more_pixels_than_pillow_allows_are_taken_as_long_as_memory_lasts(tmp_path, monkeypatch):
    """And Pillow's limit, which is everybody's, is afterwards as it was."""
    Image.new("RGB", (100, 100), RED).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert is_red(load_photo(tmp_path / "huge.png"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * 99 * 16))
    with pytest.raises(UserError, match=r"huge\.png: has more pixels than there is memory to decode; scale it down"):
        load_photo(tmp_path / "huge.png")
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_find_photos_sorts_and_names_once_what_it_passes_over(tmp_path, capsys):
    said_nothing_of = [".hidden.png", "Thumbs.db", "desktop.ini", ".DS_Store", "a.JPG.json", "a.txt", "b.caption"]
    said_nothing_of.append("metadata.jsonl")
    named = ["IMG_2.HEIC", "IMG_1.heic", "film.mov", "book.pdf"]
    for name in ("b.png", "a.JPG", *said_nothing_of, *named):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for look in (lambda: find_photos(tmp_path, "subject.photos"), lambda: list_photos(tmp_path)):
        assert [photo.name for photo in look()] == ["a.JPG", "b.png"]
    assert capsys.readouterr().err == (
        f"{tmp_path}: passed over: "
        "4 in formats that Pillow cannot read (IMG_1.heic, IMG_2.HEIC, book.pdf, ...); "
        "convert photos among them to JPEG or PNG; "
        "1 linked to what is not there (gone.jpg)\n"
    )


def test_find_photos_says_nothing_where_it_passes_over_nothing_of_the_users(tmp_path, capsys):
    for name in ("a.jpg", ".hidden", "Thumbs.db"):
        (tmp_path / name).touch()
    find_photos(tmp_path, "subject.photos")
    assert capsys.readouterr().err == ""


def test_find_photos_names_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"subject\.photos: .*nowhere does not exist"):
        find_photos(tmp_path / "nowhere", "subject.photos")
    with pytest.raises(UserError, match=r"x: cannot be read \(File name too long\); allow it or name another folder"):
        find_photos(tmp_path / ("x" * 300), "subject.photos")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match="is a file; give the folder"):
        find_photos(tmp_path / "photo.jpg", "subject.photos")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no photos in .*empty$"):
        find_photos(tmp_path / "empty", "subject.photos")
    (tmp_path / "empty" / "IMG_1.HEIC").touch()
    with pytest.raises(UserError, match=r"no photos in .*empty; 1 in .*\(IMG_1\.HEIC\); convert .* to JPEG"):
        find_photos(tmp_path / "empty", "subject.photos")


def test_photos_one_folder_further_down_are_pointed_at(tmp_path):
    for name in ("10_ohwx dog/a.jpg", "10_ohwx dog/b.jpg", "20_ohwx dog/c.jpg", "notes/d.txt", ".hidden/e.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [folder.name for folder in folders_below(tmp_path)] == ["10_ohwx dog", "20_ohwx dog"]
    with pytest.raises(UserError, match=r"no photos in .* itself; there are 2 in .*10_ohwx dog, 1 in .*20_ohwx dog"):
        find_photos(tmp_path, "subject.photos")


def test_real_photos_load(dog_photos):
    for photo in find_photos(dog_photos, "subject.photos"):
        pixels = np.asarray(load_photo(photo))
        assert pixels.shape[2] == 3
        assert 10 < pixels.std() < 128
