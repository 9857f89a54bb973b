"""What is to be learned: photos of the subject under its prompts, and class images under the class prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_db.concept import generated
from lowvram_db.concept.captions import Box, Sidecar, filled, names_subject, read_sidecars
from lowvram_db.concept.prompts import Choice
from lowvram_db.config import Config
from lowvram_db.errors import UserError
from lowvram_db.photos import find_photos, load_photo, mask_of
from lowvram_db.wording import NO_PROMPT

if TYPE_CHECKING:
    from lowvram_db.families.base import Family

_LEAST_PHOTOS = 3  # to train on beside those kept back


@dataclass(frozen=True)
class Concept:
    """The training data by name. A photo is shown under its own captions, or else under any of the prompts."""

    instance_photos: list[Path]
    instance_prompts: list[str]
    class_photos: list[Path]  # empty where prior preservation is off
    class_prompt: str  # of class images that know no other
    weights: list[float] = field(default_factory=list)  # of the instance prompts; default: all alike
    captions: Mapping[Path, list[str]] = field(default_factory=dict)  # of photos that have some
    class_prompts: Mapping[Path, str] = field(default_factory=dict)  # of class images that know their own
    caption_dropout: float = 0.0  # share of the subject's rows that are shown without any words
    masks: Mapping[Path, Path] = field(default_factory=dict)  # of photos that have one
    mask_weight: float = 0.0  # in the loss, of what is not the subject there

    @property
    def prompts(self) -> list[str]:
        """Every one that a step may ask for, once."""
        own = [caption for photo in self.instance_photos for caption in self.captions.get(photo, [])]
        drawn = [*self.instance_prompts, *own, *([NO_PROMPT] if self.caption_dropout else [])]
        of_class = [self.class_prompts.get(photo, self.class_prompt) for photo in self.class_photos]
        return list(dict.fromkeys([*drawn, *of_class]))

    @cached_property
    def choices(self) -> dict[Path, Choice]:
        """What each photo is shown under."""
        weights = self.weights or [1.0] * len(self.instance_prompts)
        common = Choice(dict(zip(self.instance_prompts, weights, strict=True)))
        own = {photo: Choice(dict.fromkeys(captions, 1.0)) for photo, captions in self.captions.items()}
        return {photo: own.get(photo, common) for photo in self.instance_photos}

    def check(self, family: Family) -> None:
        """Raise UserError for captions that are longer than the model reads, naming their pictures."""
        for photo, captions in [*self.captions.items(), *((p, [prompt]) for p, prompt in self.class_prompts.items())]:
            try:
                family.check_prompts(captions)
            except UserError as error:
                raise UserError(f"{photo}: its caption, {error}") from error


def check_folders(photos: Path, class_images: Path | None, run: Path) -> None:
    """Raise UserError where pictures of subject and class would mix, or a run write among the user's pictures.

    class_images: as the user named it, if so.
    """
    if class_images is not None:
        one, other = photos.resolve(), class_images.resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
            where = (
                "is the folder of subject.photos"
                if one == other
                else f"and subject.photos ({photos}) lie in each other"
            )
            raise UserError(f"prior.images: {class_images} {where}; class images need a folder of their own")
    for pictures in filter(None, (photos, class_images)):
        if pictures.resolve() == run.resolve():
            raise UserError(f"output.name: {run} is a folder of pictures; choose another name or output.dir")


def subject_photos(config: Config, is_good: Callable[[Path], bool] = lambda photo: False) -> list[Path]:
    """The subject's photos, each decoded once so that a bad one is named before any work begins.

    is_good: tells of a photo that it need not be decoded. Raises UserError naming the folder or file.
    """
    photos = find_photos(Path(config.subject.photos).expanduser(), "subject.photos")
    if (kept_back := config.train.hold_out) and len(photos) < kept_back + _LEAST_PHOTOS:
        raise UserError(
            f"train.hold_out: of {len(photos)} photos, {kept_back} kept back would leave fewer than {_LEAST_PHOTOS}; "
            "lower it, or add photos"
        )
    for photo in photos:
        if not is_good(photo):
            load_photo(photo)
    return photos


def describe(config: Config, instance_photos: list[Path], class_photos: list[Path]) -> Concept:
    """Photos and filled-in prompts, together, with what is written beside the pictures.

    Raises UserError for what cannot be read there, or names the subject beside a class image.
    """
    weights: dict[str, float] = {}
    for template, weight in config.subject.templates.items():
        weights[config.fill(template)] = weights.get(config.fill(template), 0.0) + weight
    subject = config.subject
    captions = {
        photo: [filled(caption, subject.identifier, subject.class_noun) for caption in sidecar.captions]
        for photo, sidecar in _sidecars(instance_photos).items()
        if sidecar.captions
    }
    return Concept(
        instance_photos=instance_photos,
        instance_prompts=list(weights),
        class_photos=class_photos,
        class_prompt=config.fill(config.prior.prompt),
        weights=list(weights.values()),
        captions=captions,
        class_prompts=_class_prompts(config, class_photos),
        caption_dropout=subject.caption_dropout,
        masks={photo: mask for photo in instance_photos if (mask := mask_of(photo))},
        mask_weight=config.train.mask_weight,
    )


def crop_boxes(photos: list[Path]) -> dict[Path, Box]:
    """Of the photos that have one beside them: what is to be seen of each, upright. Raises UserError as describe."""
    return {photo: sidecar.crop for photo, sidecar in _sidecars(photos).items() if sidecar.crop}


def _class_prompts(config: Config, photos: list[Path]) -> dict[Path, str]:
    """Of the class images that know their own: what one was made by, else what stands beside it first."""
    prompts = {}
    identifier = config.subject.identifier
    sidecars = _sidecars(photos)
    for photo in photos:
        if made_by := generated.recipe_of(photo):
            prompts[photo] = made_by.prompt
        elif (sidecar := sidecars.get(photo)) and sidecar.captions:
            if names_subject(sidecar.captions[0], identifier):
                raise UserError(
                    f"{sidecar.file}: says {identifier} of {photo.name}, a class image; it must not name the subject"
                )
            prompts[photo] = sidecar.captions[0].replace("{class}", config.subject.class_noun)
    return prompts


def _sidecars(photos: list[Path]) -> dict[Path, Sidecar]:
    found: dict[Path, Sidecar] = {}
    for folder in dict.fromkeys(photo.parent for photo in photos):
        found |= read_sidecars(folder, [photo for photo in photos if photo.parent == folder])
    return found
