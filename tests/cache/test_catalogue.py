import contextlib
import hashlib
import os
import random
import sqlite3
import time

import numpy as np
import pytest
from PIL import Image

from lowvram_db.cache import catalogue
from lowvram_db.cache.catalogue import Catalogue
from lowvram_db.cache.key import pixels_digest
from lowvram_db.errors import UserError
from lowvram_db.photos import load_photo


@pytest.fixture
def path(tmp_path):
    return tmp_path / "files.sqlite"


@pytest.fixture
def reads(monkeypatch):
    """Counts files hashed and photos decoded."""
    counts = {"hashed": 0, "decoded": 0}

    def counted(what, function):
        def call(*arguments):
            counts[what] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(catalogue.hashlib, "file_digest", counted("hashed", hashlib.file_digest))
    monkeypatch.setattr(catalogue, "decode_photo", counted("decoded", catalogue.decode_photo))
    return counts


@pytest.fixture
def settled(monkeypatch):
    """As if every file were old enough for its times to tell a change."""
    monkeypatch.setattr(catalogue, "_SETTLED_SECONDS", -1.0)


def picture(path, shade, side=8):
    Image.fromarray(np.full((side, side, 3), shade, np.uint8)).save(path)
    return path


def look(path, photo):
    """What a fresh catalogue says of a photo, decoding it where it has to."""
    known = Catalogue(path)
    seen = known.known_photo(photo) or known.decode(photo)[0]
    known.save()
    known.close()
    return seen


def test_an_unchanged_file_is_neither_decoded_nor_read(tmp_path, path, reads, settled):
    photo = picture(tmp_path / "a.png", 1)
    first = look(path, photo)
    assert first == (pixels_digest(load_photo(photo)), (8, 8))
    reads.update(hashed=0, decoded=0)
    assert look(path, photo) == first
    assert reads == {"hashed": 0, "decoded": 0}


@pytest.mark.parametrize("change", ["touched", "copied over itself", "renamed", "copied"])
def test_the_same_bytes_are_not_decoded_again(tmp_path, path, reads, settled, change):
    photo = picture(tmp_path / "a.png", 1)
    first = look(path, photo)
    if change == "touched":
        photo.touch()
    elif change == "copied over itself":
        photo.write_bytes(photo.read_bytes())
    elif change == "renamed":
        photo = photo.rename(tmp_path / "b.png")
    else:
        (tmp_path / "b.png").write_bytes(photo.read_bytes())
        photo = tmp_path / "b.png"
    reads.update(hashed=0, decoded=0)
    assert look(path, photo) == first
    assert reads == {"hashed": 1, "decoded": 0}


def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path, path, settled):
    """As `cp -p` and photo tools do it; the kernel's change time tells."""
    photo = tmp_path / "a.bmp"
    first, second = (picture(tmp_path / f"{shade}.bmp", shade).read_bytes() for shade in (1, 2))
    photo.write_bytes(first)
    before, seen = photo.stat(), look(path, photo)
    time.sleep(0.05)  # more than one tick of the kernel's clock
    photo.write_bytes(second)
    os.utime(photo, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert photo.stat().st_size == before.st_size
    assert look(path, photo) != seen


def test_a_file_that_changed_a_moment_ago_is_read_again(tmp_path, path, reads):
    """Its times may not tell the next change, so they are not trusted until two seconds later."""
    photo = picture(tmp_path / "a.png", 1)
    look(path, photo)
    reads.update(hashed=0, decoded=0)
    look(path, photo)
    assert reads == {"hashed": 1, "decoded": 0}


def test_a_second_edit_within_a_clock_tick_is_seen(tmp_path, path, monkeypatch):
    """The times of both are made the same, as a coarse clock makes them; the first is already in the catalogue."""
    photo = tmp_path / "a.bmp"
    first, second = (picture(tmp_path / f"{shade}.bmp", shade).read_bytes() for shade in (1, 2))
    photo.write_bytes(first)
    same = catalogue._status(photo.stat())
    monkeypatch.setattr(catalogue, "_status", lambda status: same)
    seen = look(path, photo)
    photo.write_bytes(second)
    assert look(path, photo) != seen


def test_random_changes_are_never_missed(tmp_path, path, monkeypatch):
    """Edits, swaps, renames, touches and times set back, on three files, against decoding them all every time."""
    monkeypatch.setattr(catalogue, "_SETTLED_SECONDS", 0.02)
    chance, photos = random.Random(0), [tmp_path / f"{name}.bmp" for name in "abc"]
    for number, photo in enumerate(photos):
        picture(photo, number)
    for round_ in range(150):
        photo, other = chance.sample(photos, 2)
        before = photo.stat()
        change = chance.choice(["edit", "swap", "replace", "touch", "nothing", "wait"])
        if change == "edit":
            picture(photo, chance.randrange(4))
            os.utime(photo, ns=(before.st_atime_ns, before.st_mtime_ns))
        elif change == "swap":
            photo.rename(tmp_path / "x")
            other.rename(photo)
            (tmp_path / "x").rename(other)
        elif change == "replace":
            picture(tmp_path / "new.bmp", chance.randrange(4)).replace(photo)
        elif change == "touch":
            photo.touch()
        elif change == "wait":
            time.sleep(0.03)
        for each in photos:
            assert look(path, each).digest == pixels_digest(load_photo(each)), f"{change} in round {round_}"


def test_what_another_pillow_decoded_is_decoded_again(tmp_path, path, reads, monkeypatch):
    photo = picture(tmp_path / "a.png", 1)
    look(path, photo)
    monkeypatch.setattr(catalogue, "DECODER", "another")
    reads["decoded"] = 0
    look(path, photo)
    assert reads["decoded"] == 1


def test_a_changed_fact_is_no_fact(tmp_path, path, settled):
    """Every value in the table, altered or of another type: such a row counts for nothing."""
    photo = picture(tmp_path / "a.png", 1)
    known = Catalogue(path)
    known.remember_shard("one", 3)
    known.save()
    known.close()
    truth = look(path, photo)
    content = path.read_bytes()
    with contextlib.closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT rowid, kind, name, fact, seal FROM facts").fetchall()
    assert len(rows) == 3
    for rowid, *values in rows:
        for column, value in zip(("kind", "name", "fact", "seal"), values, strict=True):
            for other in (chr(ord(value[0]) ^ 1) + value[1:], None, 7, b"\xff"):
                path.write_bytes(content)
                with contextlib.closing(sqlite3.connect(path)) as database, database:
                    database.execute(f"UPDATE facts SET {column} = ? WHERE rowid = ?", (other, rowid))
                assert Catalogue(path).check()
                assert Catalogue(path).shards() in ({"one": 3}, {})
                assert look(path, photo) == truth


@pytest.mark.parametrize("damage", ["garbage", "cut", "empty"])
def test_a_damaged_file_is_made_anew(tmp_path, path, reads, settled, damage, capfd):
    photo = picture(tmp_path / "a.png", 1)
    truth, content = look(path, photo), path.read_bytes()
    path.write_bytes({"garbage": b"x" * 5000, "cut": content[: len(content) // 2], "empty": b""}[damage])
    for _ in range(3):
        assert look(path, photo) == truth
    reads.update(hashed=0, decoded=0)
    assert look(path, photo) == truth
    assert reads == {"hashed": 0, "decoded": 0}
    assert not Catalogue(path).check()


def test_a_kill_before_the_first_save_is_no_damage(tmp_path, path, settled):
    sqlite3.connect(path).close()
    path.touch()
    assert not Catalogue(path).check()
    photo = picture(tmp_path / "a.png", 1)
    assert look(path, photo) == look(path, photo)


def test_a_path_that_is_no_unicode(tmp_path, path, settled):
    photo = picture(tmp_path / "a.png", 1).rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    assert look(path, photo) == look(path, photo)


def test_a_photo_that_is_gone_or_empty_is_named(tmp_path, path):
    known = Catalogue(path)
    with pytest.raises(UserError, match=r"gone\.png: is not there any more"):
        known.decode(tmp_path / "gone.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(UserError, match=r"empty\.png: not an image"):
        known.decode(tmp_path / "empty.png")


def test_another_process_that_holds_the_file_stops_nobody(tmp_path, path, monkeypatch):
    monkeypatch.setattr(catalogue, "_BUSY_SECONDS", 0.05)
    photo = picture(tmp_path / "a.png", 1)
    truth = look(path, photo)
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert look(path, photo) == truth
        other.execute("ROLLBACK")
    other.close()
