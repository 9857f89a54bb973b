"""What is to be learned: photos of the subject under its prompts, and class images under the class prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowvram_db.config import Config
from lowvram_db.errors import UserError
from lowvram_db.photos import find_photos, load_photo

_LEAST_PHOTOS = 3  # to train on beside those kept back


@dataclass(frozen=True)
class Concept:
    """The training data by name. Every photo can be shown under every one of its prompts."""

    instance_photos: list[Path]
    instance_prompts: list[str]
    class_photos: list[Path]  # empty where prior preservation is off
    class_prompt: str

    @property
    def prompts(self) -> list[str]:
        return self.instance_prompts + ([self.class_prompt] if self.class_photos else [])


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
    """Photos and filled-in prompts, together."""
    return Concept(
        instance_photos=instance_photos,
        instance_prompts=[config.fill(template) for template in config.subject.prompts],
        class_photos=class_photos,
        class_prompt=config.fill(config.prior.prompt),
    )
