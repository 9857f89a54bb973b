"""The few photos of a subject that a run is given: `python -m lowvram_db.demo.photos SUBJECT FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from lowvram_db.demo.subjects import SUBJECTS, Subject
from lowvram_db.demo.world import Scene, render, subject_scene

COUNT = 5


def photo_scenes(subject: Subject, count: int = COUNT) -> list[Scene]:
    """The subject in the settings where it was photographed, in turn, each time in another pose."""
    places = subject.photographed
    return [subject_scene(subject, places[i % len(places)], 100 + i) for i in range(count)]


def write_photos(subject: Subject, folder: Path, count: int = COUNT) -> None:
    """Writes photo-1.png ... into `folder`, 64x64."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(photo_scenes(subject, count)):
        render(scene).save(folder / f"photo-{i + 1}.png")


if __name__ == "__main__":
    write_photos(SUBJECTS[sys.argv[1]], Path(sys.argv[2]))
