import hashlib
import os
import random
import threading
import time

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from lowvram_db.cache import catalogue
from lowvram_db.cache.catalogue import Catalogue
from lowvram_db.cache.key import pixels_digest
from lowvram_db.errors import UserError
from lowvram_db.photos import load_photo


@pytest.fixture
def path(tmp_path):
    return tmp_path / "files.jsonl"


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


def test_every_flip_and_cut_is_found(tmp_path, path, settled):
    """Every byte is covered: no bit can flip and no byte be lost unnoticed, and no such file is believed."""
    photo = picture(tmp_path / "a.png", 1)
    known = Catalogue(path)
    known.remember_shard("one", 3)
    known.save()
    truth, content = look(path, photo), path.read_bytes()
    assert not Catalogue(path).check()
    flipped = [bytes([*content[:place], content[place] ^ 1 << place % 8, *content[place + 1 :]])
               for place in range(len(content))]  # fmt: skip
    for damaged in flipped + [content[:length] for length in range(len(content))]:
        path.write_bytes(damaged)
        assert Catalogue(path).check() == ["files.jsonl: damaged"]
        assert Catalogue(path).shards() == {}
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


def test_a_shard_that_is_gone_is_forgotten(path):
    for entries, said in ((3, {"one": 3}), (0, {})):
        known = Catalogue(path)
        known.remember_shard("one", entries)
        assert known.shards() == said
        known.save()
        assert Catalogue(path).shards() == said
    assert b"one" not in path.read_bytes()


def test_what_others_save_meanwhile_is_kept_and_taken_up(path):
    first, second = Catalogue(path), Catalogue(path)
    assert first.shards() == second.shards() == {}
    first.remember_shard("one", 1)
    second.remember_shard("two", 2)
    first.save()
    second.save()
    first.save()
    assert first.shards() == second.shards() == {"one": 1, "two": 2}


def test_many_who_save_at_once_lose_nothing(path):
    def work(number):
        known = Catalogue(path)
        for shard in range(10):
            known.remember_shard(f"{number} {shard}", 1)
            known.save()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(Catalogue(path).shards()) == 40


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


def test_another_process_that_holds_the_file_stops_nobody(tmp_path, path, monkeypatch, settled):
    monkeypatch.setattr(catalogue, "_BUSY_SECONDS", 0.05)
    photo = picture(tmp_path / "a.png", 1)
    truth, known = look(path, photo), Catalogue(path)
    known.remember_shard("one", 1)
    with FileLock(tmp_path / ".files.jsonl.lock"):
        known.save()
        assert known.known_photo(photo) == truth
    assert Catalogue(path).shards() == {}
    known.save()
    assert Catalogue(path).shards() == {"one": 1}
