from pathlib import Path

import numpy as np
from PIL import Image

from lowvram_db.config import load
from lowvram_db.demo.photos import COUNT, photo_scenes, write_photos
from lowvram_db.demo.subjects import SUBJECT, SUBJECTS
from lowvram_db.demo.world import render

ROOT = Path(__file__).parents[2]


def test_photos_of_a_subject_are_written(tmp_path):
    write_photos(SUBJECTS["capsule-ball"], tmp_path / "photos")
    assert len(list((tmp_path / "photos").glob("*.png"))) == COUNT


def test_the_demos_photos_are_the_worlds_pictures_of_the_subject():
    files = sorted((ROOT / load(ROOT / "configs" / "demo.toml").subject.photos).glob("*.png"))
    assert len(files) == COUNT
    for file, scene in zip(files, photo_scenes(SUBJECT), strict=True):
        # Pillow's versions may round the edges of a shape differently.
        assert np.abs(np.asarray(Image.open(file)).astype(float) - np.asarray(render(scene))).mean() < 1
