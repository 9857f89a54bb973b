"""A look at the pictures before training: what would be learnt beside the subject, said before it costs hours."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from lowvram_db.errors import UserError
from lowvram_db.photos import load_turned
from lowvram_db.progress import say

_FEWEST = 3
_MOST_LINES = 3  # of a kind; of 200 class images they would hide the others
_ALIKE = 5  # of 64 bits that two pictures of the same may differ in
_LONGEST = 3.0  # sides of a picture, as in buckets
_LEAST_DETAIL = 0.03  # of the contrast, in what a picture of half the size would lack
_DETAIL_SIDE = 256  # pixels of the picture whose detail is looked at


@dataclass(frozen=True)
class Finding:
    """Something about a picture, or about all of them."""

    where: str
    kind: str  # in a word
    what: str
    is_warning: bool = True


def look(photos: Sequence[Path], resolution: int, class_images: Sequence[Path] = ()) -> list[Finding]:
    """What there is to say of a set of photos, and of the user's own class images, that are trained on at `resolution`
    pixels a side.

    Raises UserError as load_photo does.
    """
    findings = []
    if len(photos) < _FEWEST:
        few = f"{len(photos)} is few: {_FEWEST} or more teach what is the subject and what is not"
        findings.append(Finding("subject.photos", "few", few))
    names = {photo: photo.name for photo in photos} | {
        picture: f"{picture.parent.name}/{picture.name}" for picture in class_images
    }
    hashes: dict[Path, int] = {}
    for picture, name in names.items():
        image, was_turned = load_turned(picture)
        findings += [Finding(name, kind, what) for kind, what in _wrong(image, resolution)]
        if was_turned:
            findings.append(Finding(name, "turned", "is turned upright, as its EXIF says", is_warning=False))
        hashes[picture] = perceptual_hash(image)
    return findings + _alike(hashes, names, set(photos))


def tell(findings: Sequence[Finding], strict: bool = False) -> None:
    """Say them in a short table. Raises UserError where `strict` and one of them is a warning."""
    lines = []
    for kind in dict.fromkeys(finding.kind for finding in findings):
        same = [finding for finding in findings if finding.kind == kind]
        lines += [(finding.where, finding.what) for finding in same[:_MOST_LINES]]
        if len(same) > _MOST_LINES:
            lines.append((f"{len(same) - _MOST_LINES} more", kind))
    width = max((len(where) for where, _ in lines), default=0)
    for where, what in lines:
        say(f"  {where:{width}}  {what}")
    warnings = [finding for finding in findings if finding.is_warning]
    if strict and warnings:
        first, more = warnings[0], f" ({len(warnings)} warnings)" if len(warnings) > 1 else ""
        raise UserError(f"--strict: {first.where}: {first.what}{more}; mend it, or train without --strict")


def _alike(hashes: dict[Path, int], names: dict[Path, str], photos: set[Path]) -> list[Finding]:
    """Of pictures that are nearly the same as one before them."""
    found: dict[Path, Finding] = {}
    for one, other in combinations(hashes, 2):
        if other not in found and (hashes[one] ^ hashes[other]).bit_count() <= _ALIKE:
            mixes = one in photos and other not in photos
            what = "would teach the subject as any of its class" if mixes else "counts twice"
            kind = "of the subject" if mixes else "nearly the same as others"
            found[other] = Finding(names[other], kind, f"is nearly the same as {names[one]}, and {what}")
    return list(found.values())


def perceptual_hash(image: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 places is brighter than the one left of it. What is scaled, recompressed or a
    little brighter keeps nearly all of them."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes())


def detail(image: Image.Image) -> float:
    """What a picture loses when it is halved and doubled again, as a share of its contrast; 1 for a flat one."""
    scale = min(1.0, _DETAIL_SIDE / min(image.size))
    size = (max(2, round(image.width * scale)), max(2, round(image.height * scale)))
    grey = image.convert("L").resize(size, Image.Resampling.LANCZOS)
    half = grey.resize((max(1, size[0] // 2), max(1, size[1] // 2)), Image.Resampling.BOX)
    whole = np.asarray(grey, dtype=np.float64)
    lost = whole - np.asarray(half.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    return float(lost.std() / whole.std()) if whole.std() > 0 else 1.0


def _wrong(image: Image.Image, resolution: int) -> Iterator[tuple[str, str]]:
    """Kinds, and what they are of this picture."""
    (short, long), size = sorted(image.size), f"{image.width} x {image.height}"
    if short < resolution:
        yield "small", f"{size} is small: enlarged {resolution / short:.1f} times to {resolution}"
    if long > _LONGEST * short:
        yield "long", f"{size} is long: {1 - short / long:.0%} of it are cut off by a square"
    if short >= _DETAIL_SIDE and detail(image) < _LEAST_DETAIL:
        yield "blurred", "is blurred: what is learnt from it will be, too"
