"""What is known of files from before, so that an unchanged one is neither decoded nor read: a memory, never the truth.

Three facts are kept, in a JSON Lines file: the SHA-256 of the file at a path, as long as its status is the same; the
size and the pixel digest of a photo with that SHA-256; and how many entries each shard of the store has. Its first line
is the SHA-256 of the others. It may be lost at any time: that costs a second look at the files.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lowvram_db.atomic import replacing_file
from lowvram_db.cache.key import pixels_digest
from lowvram_db.errors import UserError
from lowvram_db.framing import Size
from lowvram_db.lock import hold
from lowvram_db.photos import DECODER, decode_photo, read_photo
from lowvram_db.progress import say

_BUSY_SECONDS = 30.0  # how long to wait for another process that is writing
# A file that changed this shortly before it was read may change once more without its times showing it: two seconds is
# the coarsest clock of a file system (FAT). Git calls such an entry racily clean.
_SETTLED_SECONDS = 2.0

Facts = dict[tuple[str, str], Any]  # by kind and name


class Seen(NamedTuple):
    """A decoded photo without its pixels."""

    digest: str  # SHA-256 of the pixels
    size: Size


class Catalogue:
    """The facts in one file, which is made when there is something to save. For one thread or many."""

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.RLock()
        self._saved: Facts | None = None  # what the file says, from the first question until the next save
        self._unsaved: Facts = {}

    def file_digest(self, path: Path) -> str:
        """SHA-256 of a file, remembered as long as its size, times and inode stay. Raises OSError."""
        now, before = time.time_ns(), path.stat()
        known = self._recall("file", _file_name(path))
        if known and known[0] == _status(before):
            return known[1]
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._remember_file(path, before, now, digest)
        return digest

    def known_photo(self, path: Path) -> Seen | None:
        """What decoding this photo would give, if its bytes were decoded before. Raises OSError."""
        known = self._recall("photo", _photo_name(self.file_digest(path)))
        return known and Seen(known[0], (known[1], known[2]))

    def is_good(self, path: Path) -> bool:
        """Whether this photo is known to be one, so that it need not be decoded."""
        try:
            return self.known_photo(path) is not None
        except OSError:
            return False

    def look(self, path: Path) -> Seen:
        """What a photo is, decoded where that is not known. Raises UserError as load_photo does."""
        try:
            return self.known_photo(path) or self.decode(path)[0]
        except OSError:
            return self.decode(path)[0]  # which says what is wrong

    def decode(self, path: Path) -> tuple[Seen, Image.Image]:
        """Read and decode a photo, and remember it. Raises UserError as load_photo does."""
        now, before = time.time_ns(), path.stat() if path.exists() else None
        content = read_photo(path)
        photo = decode_photo(content, path)
        seen, digest = Seen(pixels_digest(photo), photo.size), hashlib.sha256(content).hexdigest()
        if before:
            self._remember_file(path, before, now, digest)
        self._remember("photo", _photo_name(digest), [seen.digest, *seen.size])
        return seen, photo

    def shards(self) -> dict[str, int]:
        """Names and numbers of entries of the shards that are said to be in the store."""
        with self._lock:
            facts = self._known() | self._unsaved
        return {name: count for (kind, name), count in sorted(facts.items()) if kind == "shard" and count}

    def remember_shard(self, name: str, entries: int) -> None:
        """Say that a shard is in the store; with 0 entries, that it is not any more."""
        self._remember("shard", name, entries)

    def save(self) -> None:
        """Write what was learned since the last time; where that cannot be, it has to be learned again."""
        with self._lock:
            self._saved = None  # memory does not grow with the file, and others' facts are taken up
            if not self._unsaved:
                return
            # A full or read-only disk, or another process that holds the file, is no reason to stop.
            with contextlib.suppress(OSError, UserError), self._file_lock():
                facts = _read(self._path)
                if facts is None:
                    say(f"{self._path}: damaged; made anew, for which files are looked at once more")
                with replacing_file(self._path) as temporary:
                    temporary.write_bytes(_sealed((facts or {}) | self._unsaved))
                self._unsaved.clear()

    def check(self) -> list[str]:
        """What is wrong with the file, a line each."""
        return [] if _read(self._path) is not None else [f"{self._path.name}: damaged"]

    def _remember_file(self, path: Path, before: os.stat_result, now: int, digest: str) -> None:
        """`before` is the file's status as it was at `now` (ns), before it was read."""
        with contextlib.suppress(FileNotFoundError):
            settled = _changed(before) + _SETTLED_SECONDS * 1e9 < now and _status(path.stat()) == _status(before)
            self._remember("file", _file_name(path), [_status(before) if settled else "", digest])

    def _remember(self, kind: str, name: str, fact: Any) -> None:
        with self._lock:
            self._unsaved[kind, name] = fact

    def _recall(self, kind: str, name: str) -> Any:
        with self._lock:
            return self._unsaved.get((kind, name)) or self._known().get((kind, name))

    def _known(self) -> Facts:
        if self._saved is None:
            self._saved = _read(self._path) or {}
        return self._saved

    @contextlib.contextmanager
    def _file_lock(self) -> Iterator[None]:
        """Where no lock is to be had it goes without: another process's last facts may be lost, and learned again."""
        lock = hold(self._path.with_name(f".{self._path.name}.lock"), timeout=_BUSY_SECONDS)
        try:
            yield
        finally:
            if lock:
                lock.release()


def _read(path: Path) -> Facts | None:
    """The facts in a file, none where there is none; None where a single bit of it is not as it was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return {}
    lines = content.partition(b"\n")[2]
    if content != _seal(lines) + lines:
        return None
    return {(kind, name): fact for kind, name, fact in map(json.loads, lines.splitlines())}


def _sealed(facts: Facts) -> bytes:
    """A file's content. A shard with 0 entries is as good as never mentioned."""
    lines = "".join(json.dumps([kind, name, fact]) + "\n" for (kind, name), fact in facts.items() if fact).encode()
    return _seal(lines) + lines


def _seal(lines: bytes) -> bytes:
    """The line before the others."""
    return f'"{hashlib.sha256(lines).hexdigest()}"\n'.encode()


def _file_name(path: Path) -> str:
    """The absolute path as text, also where it is no Unicode."""
    return os.fsencode(path.absolute()).decode("utf-8", "backslashreplace")


def _photo_name(file_digest: str) -> str:
    return f"{file_digest} {DECODER}"


def _status(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_dev} {status.st_ino}"


def _changed(status: os.stat_result) -> int:
    """When the file last changed, ns: the kernel's own time where there is one, which nobody sets back."""
    return status.st_mtime_ns if os.name == "nt" else status.st_ctime_ns
