import errno
import os
import re
import shutil
import stat
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lowvram_db.atomic import creating_folder, free_name, remove_folder, remove_leftovers, rename, replacing_file
from lowvram_db.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    for content in ("one", "two"):
        with replacing_file(path) as temporary:
            temporary.write_text(content)
        assert path.read_text() == content
    assert names(path.parent) == ["file"]


def test_whoever_reads_the_old_file_reads_it_to_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as reader:
        with replacing_file(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with creating_folder(tmp_path / "folder") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("x")
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "x"
    with pytest.raises(RuntimeError), creating_folder(tmp_path / "other") as temporary:
        (temporary / "file").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["folder"]


def test_leftovers_of_a_killed_process_go_and_all_else_stays(tmp_path):
    (tmp_path / ".file.partial-01234567").write_text("half")
    (tmp_path / ".folder.partial-01234567").mkdir()
    theirs = [".config", ".file.partial-mine", ".file.partial-0123456789", ".notes.partial-01234567"]
    for name in theirs:
        (tmp_path / name).write_text("mine")
    remove_leftovers(tmp_path, "file|folder")
    assert names(tmp_path) == sorted(theirs)


def test_what_is_in_the_way_of_a_folder_stays(tmp_path):
    (tmp_path / "step").mkdir()
    with pytest.raises(UserError, match="step: is in the way"), creating_folder(tmp_path / "step"):
        pytest.fail("there is nothing to be written")
    assert names(tmp_path) == ["step"]


def test_a_free_name_is_one_that_nothing_has(tmp_path):
    assert free_name(tmp_path / "model") == tmp_path / "model"
    (tmp_path / "model").touch()
    (tmp_path / "model-2").mkdir()
    assert free_name(tmp_path / "model") == tmp_path / "model-3"


def test_a_folder_is_removed(tmp_path):
    (tmp_path / "step" / "inner").mkdir(parents=True)
    remove_folder(tmp_path / "step")
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(tmp_path, number):
    with pytest.raises(UserError, match=r"file: the disk is full \(.* GiB free\)"), replacing_file(tmp_path / "file"):
        raise OSError(number, os.strerror(number))


def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match="file: cannot be written"), replacing_file(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.fixture
def sync_answers(monkeypatch):
    """Let os.fsync fail with `number` for folders, or for files."""
    real = os.fsync

    def answer(number, *, folders):
        def fsync(handle):
            if stat.S_ISDIR(os.fstat(handle).st_mode) == folders:
                raise OSError(number, os.strerror(number))
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)

    return answer


@pytest.mark.skipif(os.name == "nt", reason="Windows syncs no folder")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EACCES])
def test_a_file_system_that_syncs_no_folders_is_good_enough(tmp_path, sync_answers, number):
    sync_answers(number, folders=True)
    with replacing_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    with creating_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("x")
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("folders", [False, pytest.param(True, marks=pytest.mark.skipif(os.name == "nt", reason=""))])
def test_a_sync_that_fails_is_an_error_that_names_what_it_was_of(tmp_path, sync_answers, folders):
    sync_answers(errno.EIO, folders=folders)
    with (
        pytest.raises(OSError, match=re.escape(str(tmp_path))) as caught,
        replacing_file(tmp_path / "file") as temporary,
    ):
        temporary.write_text("new")
    assert caught.value.errno == errno.EIO
    assert names(tmp_path) == (["file"] if folders else [])


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_can_be_written(tmp_path):
    tmp_path.chmod(0o300)
    with replacing_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    tmp_path.chmod(0o700)
    assert names(tmp_path) == ["file"]


def test_a_disk_that_is_really_full(small_disk):
    folder = small_disk("1m")
    path = folder / "weights.safetensors"
    with replacing_file(path) as temporary:
        save_file({"weight": torch.ones(1000)}, temporary)
    before = path.read_bytes()
    with pytest.raises(UserError, match="the disk is full"), replacing_file(path) as temporary:
        save_file({"weight": torch.ones(1_000_000)}, temporary)
    with pytest.raises(UserError, match="the disk is full"), creating_folder(folder / "step") as temporary:
        (temporary / "big").write_bytes(b"x" * 2_000_000)
    assert path.read_bytes() == before
    assert names(folder) == ["weights.safetensors"]


def write_file(path):
    with replacing_file(path) as temporary:
        temporary.write_text("new")


def write_folder(path):
    with creating_folder(path) as temporary:
        (temporary / "file").write_text("new")


def move_aside(path):
    path.mkdir()
    rename(path, path.with_name("aside"))


def remove(path):
    path.mkdir()
    remove_folder(path)


@pytest.fixture
def held_open(monkeypatch):
    """As Windows has it while a scanner reads what was written: the next so many renames fail. Returns the pauses."""

    def hold(times, winerror):
        pauses, left = [], [times]

        def refusing(move):
            def moved(self, target):
                if left[0]:
                    left[0] -= 1
                    error = PermissionError(errno.EACCES, "in use by another process")
                    error.winerror = winerror
                    raise error
                return move(self, target)

            return moved

        for name in ("rename", "replace"):
            monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
        monkeypatch.setattr(time, "sleep", pauses.append)
        return pauses

    return hold


@pytest.mark.parametrize("winerror", [5, 32])
@pytest.mark.parametrize(
    ("work", "left"),
    [(write_file, ["path"]), (write_folder, ["path"]), (move_aside, ["aside"]), (remove, [])],
)
def test_what_a_scanner_holds_open_is_waited_for(tmp_path, held_open, work, left, winerror):
    pauses = held_open(4, winerror)
    work(tmp_path / "path")
    assert names(tmp_path) == left
    assert len(pauses) == 4 and pauses == sorted(pauses)


def test_what_stays_open_is_named_after_some_seconds(tmp_path, held_open):
    pauses = held_open(1000, 32)
    with pytest.raises(UserError, match="path: cannot be written"):
        write_file(tmp_path / "path")
    assert 5 < sum(pauses) < 20
    assert names(tmp_path) == []


def test_elsewhere_nothing_is_waited_for(tmp_path, held_open):
    pauses = held_open(1, None)
    with pytest.raises(UserError, match="path: cannot be written"):
        write_file(tmp_path / "path")
    assert not pauses


def test_what_is_marked_read_only_is_deleted_on_windows_too(tmp_path, monkeypatch):
    rmtree = shutil.rmtree

    def as_windows_does(folder, ignore_errors):
        if all(os.access(file, os.W_OK) and file.stat().st_mode & 0o200 for file in folder.rglob("*")):
            rmtree(folder, ignore_errors=ignore_errors)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(shutil, "rmtree", as_windows_does)
    folder = tmp_path / "step"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text("x")
    (folder / "inner" / "file").chmod(0o400)
    remove_folder(folder)
    assert names(tmp_path) == []
