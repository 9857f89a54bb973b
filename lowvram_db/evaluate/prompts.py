"""What a subject is asked for when it is judged: the 25 prompts a kind of the DreamBooth paper, or those of a file.

Ruiz et al. 2023, supplementary material; github.com/google/dreambooth, prompts_and_classes.txt.
"""

from pathlib import Path

from lowvram_db.config import template_fields
from lowvram_db.errors import UserError

_BOTH = [
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
]
_OBJECTS = [
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background",
    "floating on top of water",
    "floating in an ocean of milk",
    "on top of green grass with sunflowers around it",
    "on top of a mirror",
    "on top of the sidewalk in a crowded street",
    "on top of a dirt road",
    "on top of a white rug",
]
_LIVING = [
    "wearing a red hat",
    "wearing a santa hat",
    "wearing a rainbow scarf",
    "wearing a black top hat and a monocle",
    "in a chef outfit",
    "in a firefighter outfit",
    "in a police outfit",
    "wearing pink glasses",
    "wearing a yellow shirt",
    "in a purple wizard outfit",
]
_LOOKS = ["red", "purple", "shiny", "wet", "cube shaped"]

# Whose class noun ends in one of these can wear a hat.
_LIVING_NOUNS = (
    "animal baby bear bird boy cat cow dog donkey elephant fox girl goat hamster horse kitten lion man monkey mouse "
    "owl panda parrot person pig pony puppy rabbit sheep tiger wolf woman"
)


def prompts_for(class_noun: str) -> list[str]:
    """The paper's templates for what a class noun means: a living subject, or an object."""
    living = class_noun.lower().split()[-1] in _LIVING_NOUNS.split()
    places = [f"a {{identifier}} {{class}} {words}" for words in _BOTH + (_LIVING if living else _OBJECTS)]
    return places + [f"a {look} {{identifier}} {{class}}" for look in _LOOKS]


def read_prompts(path: Path) -> list[str]:
    """The templates of a text file, one a line. Raises UserError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts {path}: cannot be read as text ({error})") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = template_fields(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        if not {"identifier"} <= fields <= {"identifier", "class"}:
            raise UserError(
                f"{path}, line {number}: {line.strip()!r} has to name the subject, as in "
                "'a {identifier} {class} in the snow', and can name nothing else in braces"
            )
        found.append(line.strip())
    if not found:
        raise UserError(f"--prompts {path}: holds no prompt; write one a line")
    return list(dict.fromkeys(found))
