"""What is known of files from before, so that an unchanged one is neither decoded nor read: a memory, never the truth.

Three facts are kept, in SQLite: the SHA-256 of the file at a path, as long as its status is the same; the size and the
pixel digest of a photo with that SHA-256; and how many entries each shard of the store has. Every row carries a
checksum. A row, or the whole file, may be lost at any time: it costs a second look at the files.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lowvram_db.cache.framing import Size
from lowvram_db.cache.key import pixels_digest
from lowvram_db.photos import DECODER, decode_photo, read_photo
from lowvram_db.progress import say

_BUSY_SECONDS = 30.0  # how long to wait for another process that is writing
# A file that changed this shortly before it was read may change once more without its times showing it: two seconds is
# the coarsest clock of a file system (FAT). Git calls such an entry racily clean.
_SETTLED_SECONDS = 2.0
_CREATE = "CREATE TABLE IF NOT EXISTS facts (kind TEXT, name TEXT, fact TEXT, seal TEXT, PRIMARY KEY (kind, name))"


class Seen(NamedTuple):
    """A decoded photo without its pixels."""

    digest: str  # SHA-256 of the pixels
    size: Size


class Catalogue:
    """The facts in one SQLite file, which is made when there is something to save. For one thread or many."""

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.RLock()
        self._database: sqlite3.Connection | None = None
        self._unsaved: dict[tuple[str, str], Any] = {}

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
            saved = self._query("SELECT name FROM facts WHERE kind = 'shard'")
            names = {name for (name,) in saved if isinstance(name, str)}  # anything, where the file is damaged
            names |= {name for kind, name in self._unsaved if kind == "shard"}
            counts = {name: self._recall("shard", name) for name in sorted(names)}
            return {name: count for name, count in counts.items() if count}

    def remember_shard(self, name: str, entries: int) -> None:
        """Say that a shard is in the store; with 0 entries, that it is not any more."""
        self._remember("shard", name, entries)

    def save(self) -> None:
        """Write what was learned since the last time; where that cannot be, it has to be learned again."""
        with self._lock:
            rows = [(kind, name, text := json.dumps(fact), _seal(kind, name, text))
                    for (kind, name), fact in self._unsaved.items()]  # fmt: skip
            try:
                self._write(rows)
                self._unsaved.clear()
            except sqlite3.OperationalError:
                pass  # a full or read-only disk, or another process that holds it: no reason to stop
            except sqlite3.DatabaseError:
                self._start_anew()  # for the next save

    def check(self) -> list[str]:
        """What is wrong with the file, a line each."""
        if not self._path.exists():
            return []
        try:
            database = self._connect()
            wrong = [str(line) for (line,) in database.execute("PRAGMA integrity_check") if line != "ok"]
            # A process that was killed before its first save leaves a file without a table.
            tables = database.execute("SELECT name FROM sqlite_master").fetchall()
            rows = database.execute("SELECT kind, name, fact, seal FROM facts").fetchall() if tables else []
            wrong += [
                f"damaged row {kind} {name}" for kind, name, fact, seal in rows if seal != _seal(kind, name, fact)
            ]
        except sqlite3.Error as error:
            wrong = [str(error)]
        return [f"{self._path.name}: {line}" for line in wrong]

    def close(self) -> None:
        """Let go of the file. What was not saved is forgotten."""
        with self._lock:
            if self._database is not None:
                self._database.close()
            self._database = None

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
            if (kind, name) in self._unsaved:
                return self._unsaved[kind, name]
            rows = self._query("SELECT fact, seal FROM facts WHERE kind = ? AND name = ?", kind, name)
            return next((json.loads(fact) for fact, seal in rows if seal == _seal(kind, name, fact)), None)

    def _query(self, sql: str, *values: str) -> list[tuple[Any, ...]]:
        if self._database is None and not self._path.exists():
            return []
        try:
            return self._connect().execute(sql, values).fetchall()
        except sqlite3.DatabaseError:
            return []  # no table yet, another process that holds it, or damage, which the next save mends

    def _write(self, rows: list[tuple[str, str, str, str]]) -> None:
        if rows:
            with self._connect() as transaction:
                transaction.execute("BEGIN IMMEDIATE")
                transaction.execute(_CREATE)
                transaction.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)", rows)

    def _connect(self) -> sqlite3.Connection:
        if self._database is None:
            self._database = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, check_same_thread=False)
        return self._database

    def _start_anew(self) -> None:
        say(f"{self._path}: damaged; made anew, for which files are looked at once more")
        self.close()
        with contextlib.suppress(OSError):
            self._path.unlink()


def _file_name(path: Path) -> str:
    """The absolute path as text, also where it is no Unicode."""
    return os.fsencode(path.absolute()).decode("utf-8", "backslashreplace")


def _photo_name(file_digest: str) -> str:
    return f"{file_digest} {DECODER}"


def _seal(kind: object, name: object, fact: object) -> str:
    """A row's checksum. In a damaged file anything can stand where a text was."""
    return hashlib.sha256(f"{kind}\0{name}\0{fact}".encode()).hexdigest()


def _status(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_dev} {status.st_ino}"


def _changed(status: os.stat_result) -> int:
    """When the file last changed, ns: the kernel's own time where there is one, which nobody sets back."""
    return status.st_mtime_ns if os.name == "nt" else status.st_ctime_ns
