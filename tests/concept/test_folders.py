from pathlib import Path

import pytest

from lowvram_db.concept import check_folders
from lowvram_db.errors import UserError


@pytest.mark.parametrize(
    "photos, class_images, run, words",
    [
        ("ph", "ph", "runs/a", "is the folder of subject.photos"),
        ("ph", "./x/../ph", "runs/a", "is the folder of subject.photos"),
        ("ph", "ph/class", "runs/a", "lie in each other"),
        ("class/ph", "class", "runs/a", "lie in each other"),
        ("ph", "link", "runs/a", "is the folder of subject.photos"),
        ("ph", None, "ph", r"output\.name: .*ph is a folder of pictures"),
        ("ph", "class", "class", r"output\.name: .*class is a folder of pictures"),
    ],
)
def test_folders_that_would_mix_are_refused(tmp_path, photos, class_images, run, words):
    (tmp_path / "link").symlink_to(tmp_path / "ph")
    named = None if class_images is None else tmp_path / class_images
    with pytest.raises(UserError, match=words):
        check_folders(tmp_path / photos, named, tmp_path / run)


@pytest.mark.parametrize("photos, class_images", [("ph", "class"), ("ph", None), (".", None), ("data/a", "data/b")])
def test_folders_of_their_own_are_taken(photos, class_images):
    check_folders(Path(photos), None if class_images is None else Path(class_images), Path("runs/a"))
