"""What a user may write for a subject: the word that names it, and the templates of its prompts."""

import re
import string
import unicodedata

NO_PROMPT = ""  # what guidance steers away from, and what a caption that is left out leaves

# Words that stand in nearly every prompt: a subject that is called so would be in all of them.
_STOP_WORDS = {
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "from", "has", "he", "her", "his", "i", "in", "is",
    "it", "its", "my", "no", "not", "of", "on", "or", "our", "she", "so", "that", "the", "their", "them", "they",
    "this", "to", "was", "we", "were", "which", "with", "you", "your", "photo", "picture", "image",
}  # fmt: skip
_JOINERS = "\u200c\u200d"  # within emoji sequences, and in scripts that need them
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols to Unicode, and nothing to be seen
_PLACE = re.compile(r"\{\s*(identifier|class)\s*\}", re.IGNORECASE)  # in a template
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # Unicode's categories


def word_problem(word: str) -> str | None:
    """What is wrong with a word as one that prompts are filled with; None where nothing is."""
    if place := _PLACE.search(word):
        return f"has {place[0]} in it, which is the place for a word in a prompt; type the word itself"
    return None


def identifier_problem(word: str, class_noun: str | None = None) -> str | None:
    """What is wrong with a word as the name of a subject, with the mend; None where nothing is."""
    if problem := word_problem(word):
        return problem
    for letter in word:
        if unicodedata.category(letter) in _INVISIBLE and letter not in _JOINERS:
            return f"has an invisible character in it (U+{ord(letter):04X}); type it anew"
    if not any(unicodedata.category(letter)[0] in "LNPS" and letter not in _BLANKS for letter in word):
        return "has nothing in it that is seen; type a word"
    plain = _folded(word)
    if class_noun is not None and plain == _folded(class_noun):
        return "is the class noun itself; choose a rare word, which `lowvram-db identifier suggest MODEL` names"
    if plain in _STOP_WORDS:
        return "stands in nearly every prompt; choose a rare word, which `lowvram-db identifier suggest MODEL` names"
    return None


def _folded(word: str) -> str:
    """As tokenizers compare them."""
    return unicodedata.normalize("NFC", word).strip().casefold()


def template_fields(template: str) -> set[str]:
    """Names in braces in a prompt template. Raises ValueError where braces do not pair, or hold more than a name."""
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{template!r}: {error}; a brace that is meant as one is written twice") from error
    if any(form or conversion for _, _, form, conversion in parts):
        raise ValueError(f"{template!r}: write {{identifier}} and {{class}} alone, without : or !")
    return {str(field) for _, field, _, _ in parts}
