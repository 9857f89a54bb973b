"""What is to be learned: photos of the subject under its prompts, and class images under the class prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowvram_db.config import Config
from lowvram_db.photos import find_photos, load_photo


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


def subject_photos(config: Config, is_good: Callable[[Path], bool] = lambda photo: False) -> list[Path]:
    """The subject's photos, each decoded once so that a bad one is named before any work begins.

    is_good: tells of a photo that it need not be decoded. Raises UserError naming the folder or file.
    """
    photos = find_photos(Path(config.subject.photos).expanduser(), "subject.photos")
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
