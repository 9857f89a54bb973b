"""A file's lock, where its file system offers one: network shares and FUSE often do not."""

import errno
import warnings
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

_NOT_OFFERED = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def hold(path: Path, timeout: float = 0.0) -> BaseFileLock | None:
    """The lock of this file, held until it is released; None where there are no locks.

    Raises filelock.Timeout where another process has it for `timeout` seconds, and OSError where it cannot be made.
    """
    lock = FileLock(path, timeout=timeout)
    try:
        with warnings.catch_warnings(action="ignore"):  # newer filelocks tell of some of these by a warning
            lock.acquire()
    except Timeout:
        raise
    except NotImplementedError:  # older filelocks say ENOSYS so
        return None
    except OSError as error:
        if error.errno in _NOT_OFFERED:
            return None
        raise
    return lock


def hold_by_existence(path: Path) -> BaseFileLock:
    """The same by a file that is there as long as it is held, and stays when the process is killed.

    Of a process that was on this machine and is gone newer versions of filelock clear it away.
    Raises filelock.Timeout where the file is there, and OSError where it cannot be made.
    """
    lock = SoftFileLock(path, timeout=0)
    lock.acquire()
    return lock
