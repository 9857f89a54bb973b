"""A look at the photo set before training: what would be learnt beside the subject, said before it costs hours."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from lowvram_db.errors import UserError
from lowvram_db.photos import load_photo
from lowvram_db.progress import say

_FEWEST = 3
_ALIKE = 5  # of 64 bits that two pictures of the same may differ in
_LONGEST = 3.0  # sides of a picture, as in buckets
_LEAST_DETAIL = 0.03  # of the contrast, in what a picture of half the size would lack
_DETAIL_SIDE = 256  # pixels of the picture whose detail is looked at
_ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Finding:
    """Something about a photo, or about all of them."""

    where: str
    what: str
    is_warning: bool = True


def look(photos: Sequence[Path], resolution: int, key: str = "subject.photos") -> list[Finding]:
    """What there is to say of a set of photos that are trained on at `resolution` pixels a side.

    Raises UserError as load_photo does.
    """
    findings = []
    if len(photos) < _FEWEST:
        findings.append(
            Finding(key, f"{len(photos)} is few: {_FEWEST} or more teach what is the subject and what is not")
        )
    hashes: dict[Path, int] = {}
    for photo in photos:
        image = load_photo(photo)
        findings += [Finding(photo.name, what) for what in _wrong(image, resolution)]
        if _is_turned(photo):
            findings.append(Finding(photo.name, "is turned upright, as its EXIF says", is_warning=False))
        hashes[photo] = perceptual_hash(image)
    for one, other in combinations(photos, 2):
        if (hashes[one] ^ hashes[other]).bit_count() <= _ALIKE:
            findings.append(Finding(other.name, f"is nearly the same as {one.name}, and counts twice"))
    return findings


def tell(findings: Sequence[Finding], strict: bool = False) -> None:
    """Say them in a table. Raises UserError where `strict` and one of them is a warning."""
    width = max((len(finding.where) for finding in findings), default=0)
    for finding in findings:
        say(f"  {finding.where:{width}}  {finding.what}")
    warnings = [finding for finding in findings if finding.is_warning]
    if strict and warnings:
        first, more = warnings[0], f" ({len(warnings)} warnings)" if len(warnings) > 1 else ""
        raise UserError(f"--strict: {first.where}: {first.what}{more}; mend it, or train without --strict")


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


def _wrong(image: Image.Image, resolution: int) -> list[str]:
    short, long = sorted(image.size)
    found = []
    if short < resolution:
        found.append(
            f"{image.width} x {image.height} is small: enlarged {resolution / short:.1f} times to {resolution}"
        )
    if long > _LONGEST * short:
        found.append(f"{image.width} x {image.height} is long: {1 - short / long:.0%} of it are cut off by a square")
    if short >= _DETAIL_SIDE and detail(image) < _LEAST_DETAIL:
        found.append("is blurred: the subject will be, too")
    return found


def _is_turned(photo: Path) -> bool:
    with Image.open(photo) as opened:
        return opened.getexif().get(_ORIENTATION, 1) != 1
