"""Captions in the files and encodings that people have."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lowvram_db.concept import captions as room
from lowvram_db.concept import describe
from lowvram_db.concept.captions import filled, read_sidecars
from lowvram_db.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Photos a.jpg and b.png, and what a test writes beside them; `said` is what was told of it."""
    monkeypatch.setattr(room, "_say_once", lambda text: said.append(text))
    said: list[str] = []

    class Folder:
        photos = (tmp_path / "a.jpg", tmp_path / "b.png")

        def write(self, **files):
            for name, content in files.items():
                (tmp_path / name.replace("_", ".", 1)).write_bytes(
                    content if isinstance(content, bytes) else content.encode()
                )

        def read(self):
            return {photo.name: sidecar for photo, sidecar in read_sidecars(tmp_path, self.photos).items()}

        def captions(self):
            return {name: sidecar.captions for name, sidecar in self.read().items()}

    for photo in Folder.photos:
        Image.new("RGB", (40, 30)).save(photo)
    Folder.said, Folder.path = said, tmp_path
    return Folder()


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.encode("utf-16"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-16-be"),
        lambda text: text.encode("windows-1252"),
        lambda text: text.replace("\n", "\r\n").encode("windows-1252"),
    ],
    ids=[
        "utf-8",
        "with a mark",
        "notepad",
        "big-endian",
        "no mark",
        "big-endian, no mark",
        "windows-1252",
        "its lines",
    ],
)
def test_every_encoding_of_notepads_is_read(folder, encode):
    folder.write(a_txt=encode("a naïve {identifier} {class}\nein süßer {identifier} – “so”\n"))
    assert folder.captions() == {"a.jpg": ["a naïve {identifier} {class}", "ein süßer {identifier} – “so”"]}


def test_side_cars_go_before_lists_and_their_crops_stay(folder):
    lines = [
        {"file_name": "a.jpg", "text": "listed"},
        {"file_name": "b.png", "text": ["one", "two"], "crop": [1, 2, 30, 20]},
    ]
    folder.write(
        metadata_jsonl="\n".join(map(json.dumps, lines)), captions_jsonl='{"image": ".\\\\b.png", "caption": "nearer"}'
    )
    assert folder.captions() == {"a.jpg": ["listed"], "b.png": ["nearer"]}
    (folder.path / "captions.jsonl").unlink()
    folder.write(a_caption="second", b_txt="own")
    assert folder.captions() == {"a.jpg": ["second"], "b.png": ["own"]}
    assert folder.read()["b.png"].crop == (1, 2, 30, 20)
    folder.write(a_txt="first")
    (folder.path / "b.txt").rename(folder.path / "b.png.txt")
    assert folder.captions() == {"a.jpg": ["first"], "b.png": ["own"]}
    assert not folder.said


def test_tags_are_read_as_a1111_writes_them(folder):
    folder.write(a_txt=r"{identifier} ,dog,, (best quality:1.2), <lora:x:0.8>  blue   sky ,dog \(animal\),")
    assert folder.captions()["a.jpg"] == ["{identifier}, dog, best quality, blue sky, dog (animal)"]


def test_empty_files_and_captions_without_a_picture_are_said(folder):
    folder.write(a_txt="\ufeff \n\n", z_txt="of nothing", metadata_jsonl='{"file_name": "gone.jpg", "text": "x"}\n\n')
    assert folder.captions() == {"a.jpg": []}
    assert "a.txt: is empty; its picture is shown under subject.prompts" in folder.said[0]
    assert "2 captions belong to no picture there (z.txt, gone.jpg in metadata.jsonl)" in folder.said[1]


WRONG = {
    "huge": ("a.txt", b"x" * 70_000, r"a\.txt: is larger than captions are \(64 KiB\); move it elsewhere"),
    "no text": ("a.txt", b"\x89PNG\r\n\0\0\0\rIHDR\xff\xd8", r"a\.txt: is no text; save it as UTF-8"),
    "no json": ("metadata.jsonl", b'{"file_name": "a.jpg"}\n{oh', r"metadata\.jsonl: line 2: "),
    "deep": ("metadata.jsonl", b"[" * 100_000, r"metadata\.jsonl: line 1: "),
    "a list": ("metadata.jsonl", b'["a.jpg"]', r"line 1: is no object, such as"),
    "no picture": ("captions.jsonl", b'{"text": "x"}', r"captions\.jsonl: line 1: names no picture"),
    "a number": ("captions.jsonl", b'{"file_name": "a.jpg", "text": 3}', r"its text should be a caption"),
    "a far edge": (
        "captions.jsonl",
        b'{"file_name": "a.jpg", "crop": [0, 0, ' + b"9" * 400 + b", 9]}",
        r"line 1: int too",
    ),
    "three edges": ("captions.jsonl", b'{"file_name": "a.jpg", "crop": [1, 2, 3]}', r"its crop should be four numbers"),
    "inside out": (
        "captions.jsonl",
        b'{"file_name": "a.jpg", "crop": [9, 2, 3, 4]}',
        r"crop \[9, 2, 3, 4\] holds nothing",
    ),
    "not finite": ("captions.jsonl", b'{"file_name": "a.jpg", "crop": [0, 0, NaN, 4]}', r"holds nothing"),
}


@pytest.mark.parametrize("name, content, words", WRONG.values(), ids=WRONG)
def test_what_cannot_be_read_is_named(folder, name, content, words):
    (folder.path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        folder.read()


@given(content=st.binary(max_size=200))
def test_any_bytes_are_captions_or_a_user_error(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    (folder / "a.txt").write_bytes(content)
    (folder / "captions.jsonl").write_bytes(content)
    try:
        found = read_sidecars(folder, [folder / "a.jpg"])
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all("\0" not in caption for sidecar in found.values() for caption in sidecar.captions)


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("a {identifier} {class} in snow", "a ohwx dog in snow"),
        ("a ohwx dog in snow", "a ohwx dog in snow"),
        ("a Dog in snow, {x}", "a ohwx Dog in snow, {x}"),
        ("a {class} in snow", "a ohwx dog in snow"),
        ("in snow", "ohwx dog, in snow"),
        ("hotdogs", "ohwx dog, hotdogs"),
        ("ohwxes", "ohwx dog, ohwxes"),
    ],
)
def test_a_caption_names_the_subject_whatever_was_written(caption, wanted):
    assert filled(caption, "ohwx", "dog") == wanted


def test_photos_with_captions_are_shown_under_them(make_config, folder):
    folder.write(a_txt="a {identifier} {class} in snow")
    photos, config = folder.photos, make_config(subject={"caption_dropout": 0.5})
    concept = describe(config, photos, [])
    assert concept.captions == {photos[0]: ["a pkblz ball in snow"]}
    assert {photo: list(choice.weights) for photo, choice in concept.choices.items()} == {
        photos[0]: ["a pkblz ball in snow"],
        photos[1]: ["a photo of a pkblz ball"],
    }
    assert concept.prompts == ["a photo of a pkblz ball", "a pkblz ball in snow", ""]


def test_class_images_know_their_own_and_never_the_subject(make_config, folder):
    folder.write(a_txt="a {class} in the sea")
    concept = describe(make_config(), [], folder.photos)
    assert concept.class_prompts == {folder.photos[0]: "a ball in the sea"}
    assert concept.prompts == ["a photo of a pkblz ball", "a ball in the sea", "a photo of a ball"]
    folder.write(a_txt="a PKBLZ ball")
    with pytest.raises(UserError, match=r"a\.txt: says pkblz of a\.jpg, a class image; it must not name the subject"):
        describe(make_config(), [], folder.photos)


def test_a_caption_that_is_too_long_is_named_with_its_picture(make_config, folder, family):
    folder.write(a_txt="{identifier} " + "x" * 90)
    with pytest.raises(UserError, match=r"a\.jpg: its caption, prompt .* tokens, the model reads 77; shorten it"):
        describe(make_config(), folder.photos, []).check(family)


def test_the_photos_own_folders_are_left_as_they_are(folder):
    before = sorted(path.name for path in Path(folder.path).iterdir())
    folder.read()
    assert sorted(path.name for path in Path(folder.path).iterdir()) == before
