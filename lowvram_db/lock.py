"""A file's lock, where its file system offers one: network shares and FUSE often do not."""

import errno
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock

try:
    import fcntl
except ImportError:  # Windows, where every file can be locked
    fcntl = None  # type: ignore[assignment]

_NOT_OFFERED = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def hold(path: Path, timeout: float = 0.0) -> BaseFileLock | None:
    """The lock of this file, held until it is released; None where there are no locks.

    Raises filelock.Timeout where another process has it for `timeout` seconds, and OSError where it cannot be made.
    """
    if not _offered(path):
        return None
    lock = FileLock(path, timeout=timeout)
    lock.acquire()
    return lock


def _offered(path: Path) -> bool:
    """Asked of the system, not of filelock: without an answer some of its versions wait for ever, others fall back to
    what two processes can hold at once."""
    if fcntl is None:
        return True
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno in _NOT_OFFERED:
                return False
            raise
    return True


def hold_by_existence(path: Path) -> BaseFileLock:
    """The same by a file that is there as long as it is held, and stays when the process is killed.

    Of a process that was on this machine and is gone newer versions of filelock clear it away.
    Raises filelock.Timeout where the file is there, and OSError where it cannot be made.
    """
    lock = SoftFileLock(path, timeout=0)
    lock.acquire()
    return lock
