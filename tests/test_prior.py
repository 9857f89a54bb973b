import numpy as np
import pytest
import torch
from PIL import Image

from lowvram_db import prior
from lowvram_db.errors import UserError
from lowvram_db.prior import class_images

CPU = torch.device("cpu")


@pytest.fixture
def make(make_config, family, tmp_path):
    def make(folder=tmp_path / "class", family=family, **settings):
        config = make_config(prior={"count": 5, "steps": 2, "batch": 2} | settings)
        return class_images(config, family, folder, CPU, torch.float32)

    return make


def pixels(paths):
    return [np.asarray(Image.open(path)) for path in paths]


def test_missing_images_are_generated(make):
    images = make()
    assert [path.name for path in images] == [f"class-{number:05d}.png" for number in range(5)]
    contents = pixels(images)
    assert {content.shape for content in contents} == {(64, 64, 3)}
    assert len({content.tobytes() for content in contents}) == 5


def test_an_interrupted_generation_goes_on_with_the_same_pictures(make, tmp_path, family):
    class StopsAfterOneBatch:
        def __init__(self):
            self.batches = 0

        def __getattr__(self, name):
            return getattr(family, name)

        def pipeline(self, dtype):
            pipeline = family.pipeline(dtype)

            class Stopping:
                def to(inner, device):
                    return inner

                def __call__(inner, *arguments, **keywords):
                    self.batches += 1
                    if self.batches == 2:
                        raise KeyboardInterrupt
                    return pipeline(*arguments, **keywords)

            return Stopping()

    straight = pixels(make(folder=tmp_path / "straight"))
    with pytest.raises(KeyboardInterrupt):
        make(folder=tmp_path / "stopped", family=StopsAfterOneBatch())
    kept = sorted((tmp_path / "stopped").glob("*.png"))
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    resumed = make(folder=tmp_path / "stopped")
    assert [path.stat().st_mtime_ns for path in kept] == times, "what was there has been made again"
    for one, other in zip(pixels(resumed), straight, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1  # another batch size may round differently


def test_nothing_is_loaded_when_nothing_is_missing(make, family, monkeypatch):
    make()
    monkeypatch.setattr(family, "pipeline", lambda dtype: pytest.fail("the pipeline was loaded"))
    assert len(make()) == 5
    assert len(make(count=3)) == 3


def test_own_pictures_count_first_and_stay(make, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    for name in ("class-photo.jpg", "mine.jpg"):
        Image.new("RGB", (30, 30), "green").save(folder / name)
    before = (folder / "mine.jpg").read_bytes()
    images = make()
    generated = [f"class-{number:05d}.png" for number in range(3)]
    assert [path.name for path in images] == ["class-photo.jpg", "mine.jpg", *generated]
    assert (folder / "mine.jpg").read_bytes() == before


def test_a_bad_own_picture_is_named_before_anything_is_generated(make, tmp_path, monkeypatch):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "mine.jpg").write_text("no picture")
    monkeypatch.setattr(prior, "_generate", lambda *_: pytest.fail("generated"))
    with pytest.raises(UserError, match=r"mine\.jpg"):
        make()


def test_pictures_of_another_recipe_are_not_mixed_in(make):
    make()
    with pytest.raises(UserError, match=r"made with other settings: steps \(2 -> 3\); delete them, or name another"):
        make(steps=3)


def test_half_written_pictures_are_swept(make, tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / ".class-00001.png.partial-01234567").write_bytes(b"half")
    make()
    assert not list((tmp_path / "class").glob(".*partial*"))
