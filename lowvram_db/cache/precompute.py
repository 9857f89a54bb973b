"""Run each encoder once over what it has not seen yet, one encoder in memory at a time, and let it go."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_db.cache.catalogue import Catalogue, Seen
from lowvram_db.cache.encoder import ImageEncoder
from lowvram_db.cache.key import encoder_digest, latent_key, text_key, weights_digest
from lowvram_db.cache.store import Store
from lowvram_db.errors import UserError
from lowvram_db.families.base import Family, Moments
from lowvram_db.families.conditioning import Conditioning
from lowvram_db.families.text import encoded
from lowvram_db.families.tiles import MOST
from lowvram_db.framing import Box, Framing, Size, View
from lowvram_db.progress import Bar, say

_DECODERS = min(4, os.cpu_count() or 1)  # threads that read photos while the encoder works
_REFRESH_SECONDS = 1.0  # how often to look what another process has encoded meanwhile
_MOST_OVERFLOWED = 64  # photos kept back for the float32 VAE before it takes a turn


class Frame(NamedTuple):
    """One photo of the subject in the cache."""

    digest: str  # of its pixels
    views: list[View]  # the plain one first
    keys: list[str]  # under which each of them stands

    @property
    def size(self) -> Size:
        """Of its views, pixels; what all rows of a batch have in common."""
        return self.views[0].size


class ClassFrame(NamedTuple):
    """One class image in the cache."""

    digest: str  # of its pixels
    views: dict[Size, View]  # the plain one, cut to every size that photos have
    keys: dict[Size, str]  # under which each of them stands


@dataclass(frozen=True)
class Cached:
    """What training needs of the encoders: by which keys it stands in the store, from where it is read when wanted."""

    store: Store
    photos: dict[Path, Frame]
    class_photos: dict[Path, ClassFrame]
    prompts: dict[str, str]

    def moments(self, keys: Sequence[str]) -> Moments:
        """Moments of views of one size: float32 [len(keys), C, h, w], on the CPU. Raises UserError for a lost entry."""
        return Moments(**self._read(keys))

    def conditioning(self, prompts: Sequence[str]) -> Conditioning:
        """The text part of it: float32 [len(prompts), ...] by name, on the CPU. Raises KeyError for a prompt that was
        not encoded, and UserError for a lost entry."""
        return self._read([self.prompts[prompt] for prompt in prompts])

    def _read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        try:
            return self.store.stack(keys)
        except KeyError as error:
            raise UserError(
                f"{self.store.folder}: an entry was damaged or deleted in use; run the command again to encode it anew"
            ) from error


def precompute(
    family: Family,
    store: Store,
    device: torch.device,
    *,
    framing: Framing,
    photos: Sequence[Path],
    class_photos: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    crops: Mapping[Path, Box] = MappingProxyType({}),
    dtype: torch.dtype = torch.float32,
) -> Cached:
    """Bring moments of every photo and conditioning of every prompt into the store, as far as they are not there.

    dtype: of the encoders' weights and arithmetic; float16 and bfloat16 take half the memory, and what overflows is
    encoded again in float32. What is stored is float32 always. `class_photos` are stored from the middle alone, at each
    size that `photos` have, so that both can share a batch. crops: the boxes of photos of which no more is to be seen.

    Neither encoder is alive any more when this returns. Raises UserError for a photo that cannot be read or a disk that
    is full, and KeyboardInterrupt after Ctrl-C; what was encoded until then stays stored.
    """
    try:
        text_keys = _encode_prompts(family, prompts, store, device, dtype)
        with Bar("encoding photos", total=len(photos) + len(class_photos), unit="photo") as bar:
            encoding = _PhotoEncoding(family, store, device, dtype, bar)
            with encoding.encoder:
                subject = encoding.bring(photos, lambda path, photo: views_of(path, photo, framing, crops))
                sizes = sorted({found.views[0].size for found in subject.values()})
                others = encoding.bring(class_photos, lambda _, photo: [View.of(photo.size, size) for size in sizes])
                encoding.finish()
    finally:
        store.flush()
    return Cached(
        store,
        {photo: Frame(found.seen.digest, found.views, encoding.keys(found)) for photo, found in subject.items()},
        {
            photo: ClassFrame(
                found.seen.digest,
                dict(zip(sizes, found.views, strict=True)),
                dict(zip(sizes, encoding.keys(found), strict=True)),
            )
            for photo, found in others.items()
        },
        text_keys,
    )


def views_of(path: Path, photo: Seen, framing: Framing, crops: Mapping[Path, Box]) -> list[View]:
    """All that is looked at of a photo. Raises UserError where its crop box is larger than it."""
    box = crops.get(path)
    if box and (box[2] > photo.size[0] or box[3] > photo.size[1]):
        raise UserError(
            f"{path}: its crop ends at {box[2]:g}, {box[3]:g}, and the upright photo is {photo.size[0]} x "
            f"{photo.size[1]}; mend it in the .jsonl beside it"
        )
    return framing.views(photo.size, photo.digest, box)


def _encode_prompts(
    family: Family, prompts: Iterable[str], store: Store, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    encoder = _text_digest(family, store.catalogue) if prompts else ""
    keys = {prompt: text_key(prompt, encoder, _name(dtype)) for prompt in prompts}
    missing = [prompt for prompt, key in keys.items() if not store.holds(key)]
    for prompt, text in encoded(family, missing, device, dtype):
        store.put(keys[prompt], text)
    return keys


class _Found(NamedTuple):
    """What there is of a photo."""

    seen: Seen
    views: list[View]
    images: list[Tensor]  # the views' pixels, uint8 [3, H, W]; none where all were stored already


class _Row(NamedTuple):
    """One image on its way through the VAE."""

    photo: Path
    seen: Seen
    view: View
    pixels: Tensor  # uint8 [3, H, W]


class _PhotoEncoding:
    """Photos in any order and size -> entries in the store, in batches of one size."""

    def __init__(self, family: Family, store: Store, device: torch.device, dtype: torch.dtype, bar: Bar):
        self._family, self._store, self._device, self._dtype, self._bar = family, store, device, dtype, bar
        self._digest = _digest(family.vae_files, store.catalogue)
        self.encoder = ImageEncoder(family, device, dtype)
        self._waiting: dict[Size, list[_Row]] = {}
        self._overflowed: list[_Row] = []
        self._queued: set[str] = set()
        self._refreshed = time.monotonic()

    def bring(self, photos: Sequence[Path], views_of: Callable[[Path, Seen], list[View]]) -> dict[Path, _Found]:
        """Have these views of every photo encoded, soon (see finish); returns what was found of each photo."""
        found: dict[Path, _Found] = {}
        for photo in photos:
            seen = self._known(photo)
            if seen and all(self._stored(seen, view) for view in views_of(photo, seen)):
                found[photo] = _Found(seen, views_of(photo, seen), [])
                self._bar.advance()
        unknown = [photo for photo in photos if photo not in found]

        def decode(photo: Path) -> _Found:
            seen, image = self._store.catalogue.decode(photo)
            views = views_of(photo, seen)
            return _Found(seen, views, [view.pixels(image) for view in views])

        for photo, decoded in zip(unknown, _ahead(decode, unknown), strict=True):
            for view, pixels in zip(decoded.views, decoded.images, strict=True):
                self._add(_Row(photo, decoded.seen, view, pixels))
            found[photo] = decoded._replace(images=[])
            self._bar.advance()
        return found

    def finish(self) -> None:
        """Encode what still waits for company, and what overflowed."""
        for rows in self._waiting.values():
            self._encode(rows)
        self._waiting.clear()
        self._encode_overflowed()

    def keys(self, found: _Found) -> list[str]:
        """The keys under which a photo's views stand in the store. Raises UserError where one has gone since."""
        keys = [key for view in found.views if (key := self._stored(found.seen, view))]
        if len(keys) < len(found.views):
            raise UserError(f"{self._store.folder}: entries were deleted from it in use; run the command again")
        return keys

    def _known(self, photo: Path) -> Seen | None:
        try:
            return self._store.catalogue.known_photo(photo)
        except OSError:
            return None  # decoding it will say what is wrong

    def _stored(self, seen: Seen, view: View) -> str | None:
        """The key under which the store holds a view, if it does."""
        candidates = (self._key(seen.digest, view, tiled) for tiled in range(MOST + 1))
        return next((key for key in candidates if self._store.holds(key)), None)

    def _key(self, digest: str, view: View, tiled: int) -> str:
        return latent_key(digest, view, self._digest, _name(self._dtype), tiled)

    def _add(self, row: _Row) -> None:
        """Take a row in, unless it is the same as another; a full batch is encoded at once."""
        key = self._key(row.seen.digest, row.view, tiled=0)
        if key in self._queued:
            return
        self._queued.add(key)
        waiting = self._waiting.setdefault(row.view.size, [])
        waiting.append(row)
        if len(waiting) >= self.encoder.batch(row.pixels):
            self._encode(waiting)
            waiting.clear()

    def _encode(self, rows: list[_Row]) -> None:
        if time.monotonic() - self._refreshed > _REFRESH_SECONDS:
            self._store.refresh()
            self._refreshed = time.monotonic()
        missing = [row for row in rows if not self._stored(row.seen, row.view)]
        if missing:
            self._overflowed += self._put(missing, self.encoder)
        if len(self._overflowed) >= _MOST_OVERFLOWED:
            self._encode_overflowed()

    def _put(self, rows: list[_Row], encoder: ImageEncoder) -> list[_Row]:
        """Encode and store; returns the rows that came out as no numbers."""
        moments = encoder.encode(torch.stack([row.pixels for row in rows]))
        overflowed = []
        for row, mean, logvar in zip(rows, *moments, strict=True):
            if mean.isfinite().all() and logvar.isfinite().all():
                self._store.put(self._key(row.seen.digest, row.view, encoder.tiled), {"mean": mean, "logvar": logvar})
            else:
                overflowed.append(row)
        return overflowed

    def _encode_overflowed(self) -> None:
        """Give what overflowed to the float32 VAE, one by one, while the other is away."""
        rows, self._overflowed = self._overflowed, []
        if not rows:
            return
        self.encoder.unload()
        with ImageEncoder(self._family, self._device, torch.float32) as exact:
            for row in rows:
                if self._dtype == torch.float32 or self._put([row], exact):
                    raise UserError(f"{row.photo}: the VAE makes no finite numbers of it; remove it, or mend the VAE")
        say(f"{len(rows)} photos overflowed the VAE in {_name(self._dtype)} and were encoded in float32")


def _ahead(function: Callable[[Path], _Found], photos: Sequence[Path]) -> Iterator[_Found]:
    """function(photo) for every photo in order, a few of them worked on in advance by other threads."""
    waiting: deque[Future[_Found]] = deque()
    with ThreadPoolExecutor(_DECODERS) as pool:
        try:
            for photo in photos:
                waiting.append(pool.submit(function, photo))
                if len(waiting) > 2 * _DECODERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def model_digest(family: Family, catalogue: Catalogue) -> str:
    """What a model is by the content of its files, wherever they are."""
    return _digest(family.model_files, catalogue)


def _text_digest(family: Family, catalogue: Catalogue) -> str:
    """Of the text encoders with the weights that they have, trained ones instead of the files' among them."""
    untrained = _digest(family.text_files, catalogue)
    return encoder_digest([(untrained, weights_digest(family.tuned))]) if family.tuned else untrained


def _digest(files: Iterable[Path], catalogue: Catalogue) -> str:
    return encoder_digest([(file.name, catalogue.file_digest(file)) for file in files])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
