"""Files that are either whole or absent: write beside the name, sync, rename into place."""

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from lowvram_db.errors import DiskRefuses, UserError

# What network shares, FUSE and shared folders of virtual machines answer that have no sync (of folders), and what a
# folder answers that may be written but not read.
_NO_SYNC_OFFERED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EPERM}
_HELD_OPEN = 5, 32  # ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION
_PAUSES = [0.01 * 2**power for power in range(10)]  # seconds, 10 in all


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there becomes `path` on leaving, or vanishes on an error.

    Raises UserError when the disk is full or the folder cannot be written; `path` is then as it was before.
    """
    temporary = _beside(path)
    try:
        with _disk_errors_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            _patiently(temporary.replace, path)
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # a read-only disk refuses this too, and has been named already
            temporary.unlink()


@contextlib.contextmanager
def creating_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` on leaving.

    Raises UserError when there is something called `path`, the disk is full or the folder cannot be written; no part of
    it is left then.
    """
    if path.exists():
        raise UserError(f"{path}: is in the way; move it elsewhere")
    temporary = _beside(path)
    try:
        with _disk_errors_named(path):
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                _sync(file)
            _sync(temporary)
            rename(temporary, path)
            _sync(path.parent)
    finally:
        _remove(temporary)


def remove_folder(path: Path) -> None:
    """Delete a folder so that a kill in the middle leaves no half of it under its own name."""
    doomed = _beside(path)
    rename(path, doomed)
    _remove(doomed)


def rename(path: Path, new: Path) -> None:
    """Give a file or folder a name that is free; on Windows, patiently."""
    _patiently(path.rename, new)


def free_name(path: Path) -> Path:
    """`path`, or, where there is such a thing already, the first of path-2, path-3, ... that is free."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def remove_leftovers(folder: Path, names: str, older_than: float = 0.0) -> None:
    """Delete what a killed process left half-written in `folder` of files that are called so (a regular expression), so
    many seconds ago at least.

    Where other processes may be writing at the same time, younger files can be theirs.
    """
    for leftover in folder.glob(".*.partial-*"):
        if not re.fullmatch(rf"\.({names})\.partial-[0-9a-f]{{8}}", leftover.name):
            continue
        with contextlib.suppress(FileNotFoundError):
            if older_than and time.time() - leftover.stat().st_mtime < older_than:
                continue
        if leftover.is_dir():
            _remove(leftover)
        else:
            leftover.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")


def _patiently(move: Callable[[Path], Path], new: Path) -> None:
    """On Windows a virus scanner or an indexer opens what was just written, and nothing that is open can be moved."""
    for pause in _PAUSES:
        try:
            move(new)
            return
        except PermissionError as error:
            if getattr(error, "winerror", None) not in _HELD_OPEN:
                raise
            time.sleep(pause)
    move(new)


def _remove(folder: Path) -> None:
    """As much of a folder as can be; Windows deletes nothing that is marked read-only, as copied files may be."""
    if sys.platform == "win32":
        for file in folder.rglob("*"):
            with contextlib.suppress(OSError):
                file.chmod(stat.S_IWRITE)
    shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until the disk has it, where the file system offers that. Raises OSError, naming `path`, where it failed."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder; its rename is durable with the file's own sync
    try:
        # Windows syncs only a handle that may write.
        handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC_OFFERED:
            raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def _disk_errors_named(path: Path) -> Iterator[None]:
    """Turn the ways in which a disk refuses into one line that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        # safetensors reports the operating system's error only in its text
        if number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error) or "os error 112" in str(error):
            folder = next(parent for parent in path.parents if parent.exists())
            free = shutil.disk_usage(folder).free
            raise DiskRefuses(
                f"{path}: the disk is full ({free / 2**30:.2f} GiB free); free some space and run the command again"
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise DiskRefuses(f"{path}: cannot be written ({error}); choose another place") from error
        raise
