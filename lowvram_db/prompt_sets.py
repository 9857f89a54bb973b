"""Templates of training prompts by kinds of subjects, and what else a user may write in their place.

A photo is shown in training under words that are true of it, so none of these says where the subject is or what is with
it: they vary what stands around the subject's name, which then is not tied to one sentence.
"""

import math
from collections.abc import Mapping
from typing import Any

from lowvram_db.wording import template_fields

Templates = list[str] | str | dict[str, float]  # alike; the name of a set; with their weights, names among them

_THINGS = [
    "a photo of a {}", "a photo of the {}", "a photo of one {}", "a photo of my {}", "a photograph of a {}",
    "a picture of a {}", "a picture of the {}", "a picture of my {}", "an image of a {}", "an image of the {}",
    "a snapshot of a {}", "a snapshot of the {}", "a good photo of a {}", "a good photo of the {}",
    "a detailed photo of a {}", "a colour photo of a {}", "a realistic photo of a {}", "an amateur photo of a {}",
    "a high quality photo of a {}", "a photo in which there is a {}", "a photo that shows a {}", "this is a {}",
    "here is a {}", "the {}", "a {}",
]  # fmt: skip
_LIVING = [
    "a photo of a {}", "a photo of the {}", "a photo of one {}", "a photo of our {}", "a photograph of a {}",
    "a picture of a {}", "a picture of the {}", "a picture of our {}", "an image of a {}", "an image of the {}",
    "a snapshot of a {}", "a snapshot of the {}", "a portrait of a {}", "a portrait of the {}",
    "a good photo of a {}", "a good photo of the {}", "a candid photo of a {}", "a detailed photo of a {}",
    "a colour photo of a {}", "a realistic photo of a {}", "an amateur photo of a {}", "a photo that shows a {}",
    "a photo in which a {} is seen", "this is a {}", "the {}", "a {}",
]  # fmt: skip
_PEOPLE = [
    "a photo of a {}", "a photo of {}", "a photo of the {}", "a photograph of {}", "a photograph of a {}",
    "a picture of {}", "a picture of a {}", "a portrait of {}", "a portrait of a {}", "a portrait photo of {}",
    "an image of {}", "a snapshot of {}", "a snapshot of a {}", "a candid photo of {}", "a candid photo of a {}",
    "a good photo of {}", "a good photo of a {}", "a detailed photo of {}", "a colour photo of {}",
    "a realistic photo of {}", "a photo that shows {}", "a photo in which {} is seen", "this is {}", "{}", "a {}",
]  # fmt: skip
_STYLES = [
    "a {}", "the {}", "one {}", "an image of a {}", "a picture, a {}", "a scan of a {}", "a print of a {}",
    "a reproduction of a {}", "a detailed {}", "a good {}", "a complete {}",
    "a work of art, a {}", "a {} by the same hand", "a {} from a series", "this is a {}", "here is a {}",
    "a photo of a {}", "a high quality image of a {}",
    "a picture of a {}", "an artwork, a {}",
]  # fmt: skip
_SETS = {
    "object": (_THINGS, "{identifier} {class}"),
    "living": (_LIVING, "{identifier} {class}"),
    "person": (_PEOPLE, "{identifier} {class}"),
    "style": (_STYLES, "{class} in the style of {identifier}"),
}


def weighted(given: Templates, of_the_class: bool = False) -> dict[str, float]:
    """Every template with its share of the draws; a set's weight is shared by all of its templates.

    of_the_class: take the templates of a set that name the class alone.
    """
    weights = given if isinstance(given, dict) else dict.fromkeys([given] if isinstance(given, str) else given, 1.0)
    shares: dict[str, float] = {}
    largest = max(weights.values())  # beside which none is too large or too small to be added up
    for template, weight in weights.items():
        expanded = _expanded(template, of_the_class)
        for one in expanded:
            shares[one] = shares.get(one, 0.0) + weight / largest / len(expanded)
    total = sum(shares.values())
    return {template: share / total for template, share in shares.items()}


def _expanded(template: str, of_the_class: bool) -> list[str]:
    if template not in _SETS:
        return [template]
    frames, subject = _SETS[template]
    return [frame.replace("{}", "{class}" if of_the_class else subject) for frame in frames]


def as_templates(given: Any) -> Templates:
    """What a user wrote, seen to be templates. Raises ValueError, with the mend."""
    if isinstance(given, str):
        if given not in _SETS:
            raise ValueError(f"{given!r} is no set of prompts ({', '.join(_SETS)}); write templates in [brackets]")
        return given
    if isinstance(given, list) and all(isinstance(template, str) for template in given):
        templates = given
    elif isinstance(given, Mapping) and all(_is_weight(weight) for weight in given.values()):
        templates = list(given)
        if templates and not any(given.values()):
            raise ValueError("the weights are zero everywhere; give at least one template more")
    else:
        raise ValueError("should be a list of templates, the name of a set, or a table of both with weights from 0 up")
    if not templates:
        raise ValueError("must not be empty")
    for template in templates:
        if not template.strip():
            raise ValueError("a template must not be empty")
        template_fields(template)
    return given if isinstance(given, list) else {template: float(weight) for template, weight in given.items()}


def _is_weight(weight: Any) -> bool:
    return type(weight) in (int, float) and math.isfinite(weight) and weight >= 0
