"""Which words to name a subject by: those of a model's vocabulary that mean least to it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowvram_db.concept.identifier import RARE_FROM, Lexicon
from lowvram_db.errors import UserError
from lowvram_db.formats.tokens import ENDS_A_WORD, Tokens, read_tokens
from lowvram_db.quiet import hide_loading_bars
from lowvram_db.reading import Reading

_CANDIDATES = 200  # whose embeddings are looked at
_CANDIDATE = re.compile(r"[bcdfghjklmnpqrstvwxz]{3,4}</w>")  # without a vowel it is hardly a word or a name
_LISTS = [Path("/usr/share/dict", name) for name in ("words", "american-english", "british-english", "propernames")]
_DRAWN = 2  # times as many words are drawn as are named
_HEADING = f"{'word':8}  {'token':>6}  {'rarer than':>10}  {'norm':>6}  {'closeness':>9}"


@dataclass(frozen=True)
class Suggestion:
    """A word of one token that means little. Rarity and the others of the text encoder that knows it best."""

    word: str
    number: int
    rarity: float
    norm: float
    closeness: float
    near: list[str]

    @property
    def numbers(self) -> str:
        """As they stand under _HEADING."""
        return f"{self.word:8}  {self.number:6}  {self.rarity:10.1%}  {self.norm:6.3f}  {self.closeness:9.3f}"


def suggest(encoders: list[Tokens], count: int = 10, class_noun: str | None = None) -> list[Suggestion]:
    """The words of one token in every vocabulary that mean least, the best first; few or none in a small vocabulary."""
    return _suggested([Lexicon(tokens, class_noun) for tokens in encoders], count)


def _suggested(lexicons: list[Lexicon], count: int) -> list[Suggestion]:
    first = lexicons[0]
    words = _rare_words(first)[:_CANDIDATES]
    words = [word for word in words if all(_is_one_token(word, lexicon) for lexicon in lexicons)]
    if not words:
        return []
    numbers = [[lexicon.tokens.read(word)[0] for word in words] for lexicon in lexicons]
    pairs = list(zip(lexicons, numbers, strict=True))
    rarity = np.min([[lexicon.rarity(number) for number in own] for lexicon, own in pairs], axis=0)
    norms = np.max([[lexicon.norm(number) for number in own] for lexicon, own in pairs], axis=0)
    closeness = np.max([lexicon.closeness(own) for lexicon, own in pairs], axis=0)
    meaning = _places(-rarity) + _places(norms) + _places(closeness)
    return [
        Suggestion(
            words[i],
            numbers[0][i],
            float(rarity[i]),
            float(norms[i]),
            float(closeness[i]),
            first.told(words[i]).pieces[0].near,
        )
        for i in np.argsort(meaning, kind="stable")[:count]
    ]


def _rare_words(lexicon: Lexicon) -> list[str]:
    """The rarest first."""
    known = _listed()
    found = [
        (lexicon.rarity(number), token.removesuffix(ENDS_A_WORD))
        for token, number in lexicon.tokens.vocabulary.tokens.items()
        if _CANDIDATE.fullmatch(token) and lexicon.rarity(number) >= RARE_FROM
    ]
    return [word for _, word in sorted(found, reverse=True) if word not in known]


def _is_one_token(word: str, lexicon: Lexicon) -> bool:
    """Some tokens are read by no word: the merges take another way."""
    numbers = lexicon.tokens.read(word)
    return len(numbers) == 1 and not lexicon.beside_class(numbers)


def _listed() -> set[str]:
    """Words and names of the lists that this system has."""
    lists = [path.read_text(encoding="utf-8", errors="replace") for path in _LISTS if path.is_file()]
    return {word.lower() for text in lists for word in text.split()}


def _places(values: np.ndarray) -> np.ndarray:
    """Each value's place among them all, the least first."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")


def report_suggestions(
    model: str, reading: Reading, count: int, class_noun: str | None, sheet: Path | None = None
) -> Iterator[str]:
    """A line a word, for people. Raises UserError where the vocabulary has none.

    sheet: a PNG to write, of what the whole model draws of twice as many words, each alone; those words come first that
    change least in pictures of no words.
    """
    if sheet is not None and sheet.exists():
        raise UserError(f"--out {sheet}: exists already; choose another name")
    lexicons = [Lexicon(tokens, class_noun) for tokens in read_tokens(model, reading)]
    found = _suggested(lexicons, count if sheet is None else _DRAWN * count)
    if not found:
        raise UserError(f"{model}: its vocabulary has no rare word of one token; choose letters that make no word")
    if sheet is None:
        yield f"{_HEADING}  nearest words"
        for word in found:
            yield f"{word.numbers}  {', '.join(word.near)}"
    else:
        yield from _drawn(model, reading, found, count, sheet)
    if class_noun is not None:
        for lexicon in lexicons:
            around = dict.fromkeys(map(lexicon.text, lexicon.class_words))
            yield f"not near {class_noun}, in {lexicon.tokens.part}: {', '.join(around)}"


def _drawn(model: str, reading: Reading, found: list[Suggestion], count: int, sheet: Path) -> Iterator[str]:
    from lowvram_db.concept.bare_words import draw_words  # torch, which takes seconds

    hide_loading_bars()
    words = {word.word: word for word in found}
    drawn = draw_words(model, list(words), sheet, reading)
    yield f"{_HEADING}  {'moved':>5}  {'spread':>6}  nearest words"
    for told in drawn[:count]:
        word = words[told.word]
        yield f"{word.numbers}  {told.moved:5.2f}  {told.spread:6.2f}  {', '.join(word.near)}"
    yield f"moved: how far a word alone moves pictures of no words, which lie 1 apart; of {len(drawn)}, the least first"
    yield "spread: how far apart its own pictures lie"
    yield f"pictures: {sheet}"
