from collections.abc import Callable

import pytest

from lowvram_db.config import Config
from lowvram_db.families import open_blank
from lowvram_db.families.blank import Blank


@pytest.fixture
def blank(miniature) -> Blank:
    return open_blank(miniature)


@pytest.fixture
def planned() -> Callable[..., Config]:
    """A config of a model nobody has to have; sections are given as keyword dicts."""

    def make(name: str = "stable-diffusion-v1-5/stable-diffusion-v1-5", **sections: dict[str, object]) -> Config:
        subject = {"photos": "photos", "identifier": "ohwx", "class": "dog"}
        return Config.model_validate({"model": {"name": name}, "subject": subject, **sections})

    return make
