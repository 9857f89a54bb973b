"""A folder of entries by key: shards that are written once, read through memory maps, and checked before they are used.

    FOLDER/CACHEDIR.TAG            says that the folder is ours (and to backup programs that it can be left out)
    FOLDER/v3/files.jsonl          the catalogue: what is known of files from before, and which shards there are
    FOLDER/v3/<header's digest>.safetensors     the shards, which hold everything

Shards never change and nothing else counts, so two processes may write at once: each adds files of its own. A file is
written beside its name, synced and renamed, so a kill leaves it whole or absent; what was put since the last one is
lost. Damage costs the entry it is in. A damaged shard's other entries move to a new one and the file is deleted.
"""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lowvram_db.atomic import remove_leftovers
from lowvram_db.cache.catalogue import Catalogue
from lowvram_db.cache.folder import CATALOGUE, STORE_FILES, TAG, claim, home, is_tagged
from lowvram_db.cache.shard import SUFFIX, Damaged, Entry, Shard, empty_batch, write_shard
from lowvram_db.progress import say

_SHARD_BYTES = 32 * 2**20  # entries of which a shard is written
_SHARD_SECONDS = 5.0  # or after which it is written anyway: as much work as a kill may cost
_OPEN_MAPS = 256  # each takes one of the 1,024 files that a process may have open
_LEFTOVER_SECONDS = 3600.0  # half-written files older than this are no living process's


@dataclass(frozen=True)
class Report:
    """What is in a store. Its text is for people."""

    photos: int  # views of photos
    prompts: int
    shards: int
    size: int  # bytes, with the catalogue
    others: list[str]  # names of what lies beside, of other format versions or nobody knows what

    def __str__(self) -> str:
        counts = f"views of photos: {self.photos}\nprompts: {self.prompts}\nshards: {self.shards}"
        lines = [counts, f"size: {self.size / 2**20:.1f} MiB"]
        if self.others:
            more = f" and {len(self.others) - 3} more" if len(self.others) > 3 else ""
            lines.append(f"not used, of other versions: {', '.join(self.others[:3])}{more}")
        return "\n".join(lines)


class Store:
    """The entries in a folder, open for reading and writing. A context manager, for one thread."""

    def __init__(self, folder: Path, writable: bool = True):
        """Open the folder, or make it. Without `writable` nothing in it is changed, and it has to exist.

        Raises UserError for a folder of something else, which is left untouched, and for one that cannot be made.
        """
        claim(folder, writable)
        self.folder, self._home, self._writable = folder, home(folder), writable
        self.catalogue = Catalogue(self._home / CATALOGUE)
        self._shards: dict[Path, Shard] = {}
        self._entries: dict[str, Entry] = {}
        self._spares: dict[str, list[Entry]] = {}  # the same keys' entries in further shards
        self._checked: set[str] = set()  # keys whose entry was compared with its checksum
        self._damaged: set[Path] = set()  # to be replaced by what is whole in them
        self._mapped: OrderedDict[Path, Shard] = OrderedDict()  # least recently used first
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._pending_bytes, self._pending_since = 0, 0.0
        if writable:
            with contextlib.suppress(OSError):  # a read-only cache can still be read
                remove_leftovers(self._home, STORE_FILES, older_than=_LEFTOVER_SECONDS)
        self.refresh()
        if writable:
            self._note_missing()

    def refresh(self) -> None:
        """Take up the shards that other processes have added since."""
        for path in sorted(self._home.glob(f"*{SUFFIX}")):
            if path not in self._shards and path not in self._damaged:
                try:
                    self._add(Shard(path))
                except FileNotFoundError:
                    continue  # another process has replaced it meanwhile
                except Damaged as damage:
                    self._damaged.add(path)
                    say(f"{damage}; what it held is encoded again where it is wanted")

    def holds(self, key: str) -> bool:
        """Whether the store has this entry, whole. It is read and compared with its checksum, once."""
        if key in self._pending or key in self._checked:
            return True
        while key in self._entries:
            if self._is_whole(self._entries[key]):
                self._checked.add(key)
                return True
            self._drop(key)
        return False

    def get(self, key: str) -> dict[str, Tensor] | None:
        """A copy of an entry's tensors by name; None where there is none or it is damaged."""
        return {name: batch[0] for name, batch in self.stack([key]).items()} if self.holds(key) else None

    def stack(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of entries of one kind and shape, by name, each stacked: [len(keys), ...].

        Every entry is checked when it is first read. Raises KeyError for one that is not stored or damaged, ValueError
        where shapes differ.
        """
        if not self._pending.keys().isdisjoint(keys):
            self.flush()
        self._check(keys)
        try:
            return self._copy([self._entries[key] for key in keys])
        except FileNotFoundError:  # another process has moved what is whole in a damaged shard to a new one
            self._checked.difference_update(keys)
            self._check(keys)
            return self._copy([self._entries[key] for key in keys])

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Store tensors, of one kind of entry always the same names. They are on the disk after flush, or some seconds
        later. Raises UserError when the disk is full or read-only."""
        entry = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending[key] = entry
        self._pending_bytes += sum(tensor.nbytes for tensor in entry.values())
        if self._pending_bytes >= _SHARD_BYTES or time.monotonic() - self._pending_since >= _SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was put, and save the catalogue. Raises UserError when the disk is full or read-only."""
        if self._pending:
            self._write(self._pending)
            self._pending, self._pending_bytes = {}, 0
        for path in sorted(self._damaged):
            self._replace(path)
        self.catalogue.save()

    def close(self) -> None:
        """Flush, and let go of all files."""
        try:
            if self._writable:
                self.flush()
        finally:
            for shard in self._mapped.values():
                shard.close()
            self._mapped.clear()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def verify(self) -> list[str]:
        """Read and check everything in the files; what is wrong, a line each. Changes nothing."""
        wrong = [f"{path.name}: damaged header, nothing in it can be used"
                 for path in sorted(self._damaged - self._shards.keys())]  # fmt: skip
        for path, shard in self._shards.items():
            wrong += [f"{path.name}: entry {key} is damaged" for key, entry in shard.entries.items()
                      if not self._is_whole(entry)]  # fmt: skip
            if shard.length > shard.proper_length:
                wrong.append(f"{path.name}: {shard.length - shard.proper_length} bytes too long")
        wrong += [f"{name}: missing, with its {count} entries" for name, count in self._missing().items()]
        if not is_tagged(self.folder):
            wrong.append(f"{TAG}: damaged or missing")
        return wrong + self.catalogue.check()

    def report(self) -> Report:
        """What is in the store, by its headers."""
        photos = sum("mean" in entry.tensors for entry in self._entries.values())
        others = [path.name for path in sorted(self.folder.iterdir()) if path.name not in (TAG, self._home.name)]
        size = sum(file.stat().st_size for file in self._home.glob("*"))
        return Report(photos, len(self._entries) - photos, len(self._shards), size, others)

    def _check(self, keys: Sequence[str]) -> None:
        if not self._checked.issuperset(keys):
            for key in keys:
                if not self.holds(key):
                    raise KeyError(key)

    def _copy(self, entries: list[Entry]) -> dict[str, Tensor]:
        batches = {}
        for name, first in entries[0].tensors.items():
            memory, batches[name] = empty_batch(first, len(entries))
            for row, entry in zip(memory, entries, strict=True):
                span = entry.tensors[name]
                if span[:2] != first[:2]:
                    raise ValueError(f"{name} is {first.shape} in one entry and {span.shape} in another")
                row[:] = self._mapped_shard(entry).view(span)
        for entry in entries:
            entry.shard.let_go()
        return batches

    def _mapped_shard(self, entry: Entry) -> Shard:
        """An entry's shard, mapped, with few others. Raises OSError where its file is gone."""
        shard = entry.shard
        if shard.path in self._mapped:
            self._mapped.move_to_end(shard.path)
        else:
            shard.open()
            self._mapped[shard.path] = shard
            if len(self._mapped) > _OPEN_MAPS:
                self._mapped.popitem(last=False)[1].close()
        return shard

    def _is_whole(self, entry: Entry) -> bool:
        try:
            return self._mapped_shard(entry).is_whole(entry)
        except OSError:
            return False

    def _drop(self, key: str) -> None:
        """Forget an entry that is damaged or gone, in favour of another shard's where there is one."""
        shard = self._entries.pop(key).shard
        if shard.path.exists():
            self._damaged.add(shard.path)
        self.refresh()  # another process may have replaced the shard
        if self._spares.get(key):
            self._entries.setdefault(key, self._spares[key].pop())
        if key not in self._entries:
            say(f"{shard.path}: an entry is damaged; it is encoded again where it is wanted")

    def _write(self, entries: dict[str, dict[str, Tensor]]) -> None:
        shard = write_shard(self._home, entries)
        self.catalogue.remember_shard(shard.path.name, len(shard.entries))
        self._add(shard)

    def _add(self, shard: Shard) -> None:
        self._shards[shard.path] = shard
        for key, entry in shard.entries.items():
            if self._entries.setdefault(key, entry) is not entry:
                self._spares.setdefault(key, []).append(entry)

    def _replace(self, path: Path) -> None:
        """Move what is whole in a damaged shard to a new one, and delete it."""
        shard = self._shards.get(path)
        if shard:
            whole = {key: entry for key, entry in shard.entries.items() if self._is_whole(entry)}
            self._remove(shard)
            if whole:
                self._write({key: {name: batch[0] for name, batch in self._copy([entry]).items()}
                             for key, entry in whole.items()})  # fmt: skip
        self.catalogue.remember_shard(path.name, 0)
        with contextlib.suppress(OSError):  # read-only, or mapped by another process on Windows
            path.unlink()
            self._damaged.discard(path)

    def _remove(self, shard: Shard) -> None:
        """Take a shard out of every list but the one of damaged files."""
        del self._shards[shard.path]
        self._spares = {key: left for key, spares in self._spares.items()
                        if (left := [entry for entry in spares if entry.shard is not shard])}  # fmt: skip
        for key, entry in shard.entries.items():
            if self._entries.get(key) is entry:
                del self._entries[key]
                self._checked.discard(key)
                if key in self._spares:
                    self._entries[key] = self._spares[key].pop()

    def _missing(self) -> dict[str, int]:
        """Shards that the catalogue knows and the folder has not, with the number of their entries."""
        names = {path.name for path in self._shards.keys() | self._damaged}
        return {name: count for name, count in self.catalogue.shards().items()
                if name not in names and not (self._home / name).exists()}  # fmt: skip

    def _note_missing(self) -> None:
        for name, count in self._missing().items():
            say(f"{self._home / name}: missing; its {count} entries are encoded again where they are wanted")
            self.catalogue.remember_shard(name, 0)


def catalogue_of(folder: Path) -> Catalogue:
    """What the cache in this folder, if there is one, knows of files, to be asked without opening it."""
    return Catalogue(home(folder) / CATALOGUE)
