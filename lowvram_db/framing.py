"""How a photo is looked at: which part of it, at what size, mirrored or not. Numbers only, decided before any pixel.

A square crop takes the middle of every photo. Aspect-ratio buckets keep its shape: a few sizes of nearly the square's
area, of which each photo gets the one nearest to its own ratio. Beside the plain view of a photo there can be others,
cut a little closer, elsewhere and mirrored, so that augmentation survives the cache.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lowvram_db.kernels import bits

Size = tuple[int, int]  # width, height in pixels
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

AUGMENT = 6  # the stream of the draws below; see train.objective.Stream
_MAX_RATIO = 3.0  # of a bucket's sides
_MAX_ZOOM = 1.15  # how much closer a variant may look: crops of a square photo would else all be the same


@dataclass(frozen=True)
class View:
    """A rectangle of a photo, resized and perhaps mirrored. Its text is part of a latent's key."""

    photo: Size
    size: Size
    box: tuple[float, float, float, float]  # left, top, right, bottom in the photo's pixels
    mirrored: bool = False

    @classmethod
    def of(cls, photo: tuple[float, float], size: Size, zoom: float = 1.0, x: float = 0.5, y: float = 0.5) -> "View":
        """The largest rectangle of the shape of `size`, 1/zoom as large; x, y in [0, 1] place it, .5 in the middle."""
        (width, height), shape = photo, size[0] / size[1]
        if width / height > shape:
            width_cut, height_cut = shape * height, float(height)
        else:
            width_cut, height_cut = float(width), width / shape
        width_cut, height_cut = width_cut / zoom, height_cut / zoom
        left, top = (width - width_cut) * x, (height - height_cut) * y
        # A rounding beyond the edge would be refused.
        return cls(cast(Size, photo), size, (left, top, min(left + width_cut, width), min(top + height_cut, height)))

    @classmethod
    def within(cls, photo: Size, box: Box, size: Size, zoom: float = 1.0, x: float = 0.5, y: float = 0.5) -> "View":
        """As of, of a box of the photo: left, top, right and bottom in its pixels."""
        left, top, right, bottom = box
        inner = cls.of((right - left, bottom - top), size, zoom, x, y).box
        moved = (inner[0] + left, inner[1] + top, min(inner[2] + left, right), min(inner[3] + top, bottom))
        return cls(photo, size, moved)

    @property
    def corner(self) -> Size:
        """How far from the left and the top of the photo, resized and mirrored as the view is, the view begins: whole
        pixels."""
        left, top, right, bottom = self.box
        before = self.photo[0] - right if self.mirrored else left
        return round(before * self.size[0] / (right - left)), round(top * self.size[1] / (bottom - top))

    def pixels(self, photo: Image.Image) -> Tensor:
        """What is seen of an RGB photo: uint8 [3, H, W]."""
        seen = photo.resize(self.size, Image.Resampling.LANCZOS, box=self.box)
        if self.mirrored:
            seen = seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(seen)).permute(2, 0, 1).contiguous()

    def __str__(self) -> str:
        box = " ".join(edge.hex() for edge in map(float, self.box))
        return f"lanczos {self.size[0]}x{self.size[1]} of {box}{' mirrored' if self.mirrored else ''}"


def to_float(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], as the encoders take it."""
    return pixels.float() / 127.5 - 1.0


@dataclass(frozen=True)
class Framing:
    """The settings of a data set's views."""

    resolution: int  # pixels a side of the square, whose area every bucket has at most
    crop: Literal["square", "buckets", "subject"] = "square"
    variants: int = 1  # views of each photo; the first is the plain one, from the middle
    flip: bool = False  # every other variant is mirrored
    seed: int = 0  # the variants follow from it and from the photo
    multiple: int = 64  # of the sides of a bucket, pixels
    centre: float = 0.5  # of a plain view, as a share of the photo's height from the top, as far as the photo reaches

    @cached_property
    def buckets(self) -> list[Size]:
        """The sizes to choose from: for every short side the longest that keeps within the square's area."""
        if self.crop != "buckets" or self.resolution < self.multiple:
            return [(self.resolution, self.resolution)]
        found = []
        for short in range(self.multiple, self.resolution + 1, self.multiple):
            long = self.resolution**2 // short // self.multiple * self.multiple
            if long <= _MAX_RATIO * short:
                found += [(long, short), (short, long)]
        return sorted(set(found))

    def size(self, photo: tuple[float, float]) -> Size:
        """The bucket whose ratio is nearest to the photo's, as factors go."""
        ratio = math.log(photo[0] / photo[1])
        return min(self.buckets, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))

    def views(self, photo: Size, pixels: str, box: Box | None = None) -> list[View]:
        """All variants of a photo of that size, `pixels` the digest of its content; of its box, where it has one."""
        whole = (0.0, 0.0, float(photo[0]), float(photo[1])) if box is None else box
        size = self.size((whole[2] - whole[0], whole[3] - whole[1]))
        plain = View.within(photo, whole, size, y=0.5 if box else self._height(photo, size))
        return [plain, *(self._variant(photo, whole, size, pixels, v) for v in range(1, self.variants))]

    def _height(self, photo: Size, size: Size) -> float:
        """Where a plain view lies between the top, 0, and the bottom, 1."""
        _, _, _, seen = View.of(photo, size, y=0.0).box
        free = photo[1] - seen
        if self.centre == 0.5 or free <= 0:
            return 0.5
        return min(1.0, max(0.0, (self.centre * photo[1] - seen / 2) / free))

    def _variant(self, photo: Size, box: Box, size: Size, pixels: str, variant: int) -> View:
        words = bits.philox(self.seed, torch.zeros(1, dtype=torch.int64), int(pixels[:8], 16), variant, AUGMENT)
        zoom, x, y = (int(word) / 2**32 for word in words[:3])
        view = View.within(photo, box, size, 1.0 + (_MAX_ZOOM - 1.0) * zoom, x, y)
        return replace(view, mirrored=self.flip and variant % 2 == 1)
