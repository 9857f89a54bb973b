"""Files that are either whole or absent: write beside the name, sync, rename into place."""

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from lowvram_db.errors import UserError

# What network shares, FUSE and shared folders of virtual machines answer that have no sync (of folders), and what a
# folder answers that may be written but not read.
_NO_SYNC_OFFERED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EPERM}


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
            temporary.replace(path)
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
            temporary.rename(path)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder so that a kill in the middle leaves no half of it under its own name."""
    doomed = _beside(path)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


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
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")


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
            raise UserError(
                f"{path}: the disk is full ({free / 2**30:.2f} GiB free); free some space and run the command again"
            ) from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{path}: cannot be written ({error}); choose another place") from error
        raise
