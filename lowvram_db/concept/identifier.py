"""Which word names the subject: how a model reads it, how rare its pieces are, and what they mean to it already.

A word that the model has a picture of pulls the subject towards that picture. Three things tell how little a token
means, and all stand in the vocabulary and the text encoder's embedding table. Byte-pair merges were learnt from the
most frequent on, so a late one is rare. An embedding that training has hardly touched has shrunk, as weight decay takes
what no gradient gives back (Land and Bartolo 2024, "Fishing for Magikarp"). And what has a meaning lies near words of a
like one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lowvram_db.errors import UserError
from lowvram_db.formats.tokenizer import END, START, byte_letters
from lowvram_db.formats.tokens import ENDS_A_WORD, Tokens, read_tokens
from lowvram_db.reading import Reading
from lowvram_db.wording import identifier_problem

RARE_FROM = 0.8  # of the merges: CLIP's later ones than these are abbreviations, nicknames and chance
_LONGEST = 75  # tokens of a prompt in CLIP, without its beginning and end
_NEAR = 3  # words that are shown
_CLASS_NEIGHBOURS = 20  # words around the class noun that a subject must not be called by
_VOWELS = set("aeiouy")


@dataclass(frozen=True)
class Piece:
    """One token of a word."""

    text: str  # as it is typed
    number: int
    rarity: float  # the share of all merges that are more frequent
    near: list[str]  # the words nearest to it, by its embedding
    is_word: bool  # whether it means something by itself


@dataclass(frozen=True)
class Told:
    """What one text encoder makes of a word."""

    part: str
    pieces: list[Piece]
    beside_class: bool  # whether it lies where the class noun does

    @property
    def is_rare(self) -> bool:
        return not any(piece.is_word for piece in self.pieces) and not self.beside_class

    def __str__(self) -> str:
        if len(self.pieces) == 1:
            read = f"one token ({self.pieces[0].number}), rarer than {self.pieces[0].rarity:.0%} of the vocabulary"
        else:
            read = f"{len(self.pieces)} tokens ({' '.join(piece.text for piece in self.pieces)})"
        words = [piece.text for piece in self.pieces if piece.is_word]
        if words and len(self.pieces) == 1:
            return f"{read}; it has a meaning already, which the subject would start from"
        if words:
            return f"{read}; {' and '.join(words)} has a meaning by itself, which the subject would start from"
        return f"{read}; it lies beside the class noun" if self.beside_class else f"{read}; no meaning of its own"


class Lexicon:
    """What one text encoder makes of words."""

    def __init__(self, tokens: Tokens, class_noun: str | None = None):
        self.tokens, self._class_noun = tokens, class_noun

    def told(self, word: str) -> Told:
        """Raises UserError for a word that cannot name a subject."""
        numbers = self.tokens.read(word)
        if not numbers or {self.tokens.vocabulary.tokens[mark] for mark in (START, END)} & set(numbers):
            raise UserError(f"identifier {word!r}: is no word to this model's tokenizer; choose another one")
        if len(numbers) > _LONGEST:
            raise UserError(f"identifier {word[:20]!r}...: {len(numbers)} tokens, a prompt has {_LONGEST}; shorten it")
        return Told(self.tokens.part, [self._piece(number) for number in numbers], self.beside_class(numbers))

    def rarity(self, number: int) -> float:
        """From 0, the most frequent merge and every letter, to 1."""
        rank = self._ranks.get(self.tokens.names.get(number, ""), 0)
        return rank / max(1, len(self._ranks))

    @cached_property
    def class_words(self) -> list[int]:
        """The tokens of the class noun, and the words around each that is one."""
        if self._class_noun is None:
            return []
        own = self.tokens.read(self._class_noun)
        return [
            *own,
            *(near for number in own if self._ends(number) for near in self._nearest(number, _CLASS_NEIGHBOURS)),
        ]

    def beside_class(self, numbers: Iterable[int]) -> bool:
        return bool(set(self.class_words) & {number for number in numbers if self._ends(number)})

    def text(self, number: int) -> str:
        """A token as it is typed."""
        letters = self.tokens.names[number].removesuffix(ENDS_A_WORD)
        content = bytes(_BYTES[letter] for letter in letters)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:  # a part of a character
            return f"<{content.hex(' ')}>"

    def closeness(self, numbers: list[int]) -> np.ndarray:
        """The mean cosine of each token with the words nearest to it, [len(numbers)]."""
        similar = self._similar(numbers)
        return -np.partition(-similar, _NEAR, axis=1)[:, :_NEAR].mean(1)

    def norm(self, number: int) -> float:
        return float(self._norms[number])

    def _piece(self, number: int) -> Piece:
        near = [self.text(other) for other in self._nearest(number, _NEAR)]
        return Piece(self.text(number), number, self.rarity(number), near, self._is_word(number))

    def _is_word(self, number: int) -> bool:
        """Whether a token means something by itself: it is frequent as a whole word, and spelled as words are."""
        text = self.text(number)
        whole = self.tokens.vocabulary.tokens.get(self.tokens.names[number].removesuffix(ENDS_A_WORD) + ENDS_A_WORD)
        if whole is None or self.rarity(whole) >= RARE_FROM or text.startswith("<"):
            return False
        return not text.isascii() or (len(text) > 2 and bool(_VOWELS & set(text) and set(text) - _VOWELS))

    def _ends(self, number: int) -> bool:
        return self.tokens.names[number].endswith(ENDS_A_WORD)

    @cached_property
    def _ranks(self) -> dict[str, int]:
        return {merge.replace(" ", ""): rank for rank, merge in enumerate(self.tokens.vocabulary.merges)}

    @cached_property
    def _norms(self) -> np.ndarray:
        """Of every token, float32 [tokens]."""
        table = self.tokens.embedding
        return np.sqrt(np.einsum("td,td->t", table, table))  # a copy of the table would take a second to fill

    @cached_property
    def _words(self) -> np.ndarray:
        """Numbers of the tokens that are whole words of some frequency, int64 [words]."""
        return np.array(
            [
                number
                for number, token in self.tokens.names.items()
                if token.endswith(ENDS_A_WORD) and token in self._ranks and self.text(number).isalpha()
            ],
            dtype=np.int64,
        )

    def _similar(self, numbers: list[int]) -> np.ndarray:
        """Cosines with every word but itself, float32 [len(numbers), words]."""
        lengths = np.maximum(self._norms, 1e-12)
        products = self.tokens.embedding[numbers] @ self.tokens.embedding.T
        similar = products[:, self._words] / lengths[self._words] / lengths[numbers, None]
        similar[self._words[None, :] == np.array(numbers)[:, None]] = -1.0
        return similar

    def _nearest(self, number: int, count: int) -> list[int]:
        """Numbers of the words nearest to a token, the nearest first."""
        if not len(self._words):
            return []
        return [int(self._words[place]) for place in np.argsort(-self._similar([number])[0])[:count]]


_BYTES = {letter: byte for byte, letter in byte_letters().items()}


def check(word: str, encoders: list[Tokens], class_noun: str | None = None) -> list[Told]:
    """What every text encoder makes of a word. Raises UserError for one that cannot name a subject, with the mend."""
    if problem := identifier_problem(word, class_noun):
        raise UserError(f"identifier {word!r}: {problem}")
    return [Lexicon(tokens, class_noun).told(word) for tokens in encoders]


def meant(word: str, tokens: Tokens) -> str | None:
    """What to type instead of a word that is the spelling of another one: by the letters that a vocabulary has for
    bytes, or by what a program makes of UTF-8 that it takes for Windows-1252."""
    for other in (_from_byte_letters(word), _from_windows(word), word.removesuffix(ENDS_A_WORD)):
        if other and other != word and len(tokens.read(other)) < len(tokens.read(word)):
            return other
    return None


def _from_byte_letters(word: str) -> str | None:
    return _decoded(lambda: bytes(_BYTES[letter] for letter in word.removesuffix(ENDS_A_WORD)))


def _from_windows(word: str) -> str | None:
    return _decoded(lambda: word.encode("windows-1252"))


def _decoded(encode: Callable[[], bytes]) -> str | None:
    try:
        return encode().decode("utf-8")
    except (KeyError, UnicodeError):
        return None


def summary(word: str, encoders: list[Tokens], class_noun: str | None = None) -> str:
    """One line on a word. Raises UserError as check does."""
    return _line(word, encoders, check(word, encoders, class_noun))


def told_as_json(word: str, encoders: list[Tokens], class_noun: str | None = None) -> dict[str, Any]:
    """That line, and of every text encoder the tokens that it reads. Raises UserError as check does."""
    told = check(word, encoders, class_noun)
    return {"word": word, "said": _line(word, encoders, told), "encoders": [asdict(one) for one in told]}


def _line(word: str, encoders: list[Tokens], told: list[Told]) -> str:
    said = dict.fromkeys(map(str, told))  # text encoders often share their vocabulary
    line = f"identifier {word}: {' / '.join(said)}"
    if other := meant(word, encoders[0]):
        numbers = encoders[0].read(other)
        tokens = f"one token ({numbers[0]})" if len(numbers) == 1 else f"{len(numbers)} tokens"
        codes = " ".join(f"U+{ord(letter):04X}" for letter in other)
        line += f"; as typed it is the spelling of {other} ({codes}), {tokens}: type {other}"
    return line


def report_word(model: str, reading: Reading, word: str, class_noun: str | None) -> Iterator[str]:
    """What there is to know of a word, for people. Raises UserError as check does."""
    encoders = read_tokens(model, reading)
    told = check(word, encoders, class_noun)
    for one in told:
        yield one.part
        for piece in one.pieces:
            near = f"; near {', '.join(piece.near)}" if piece.near else ""
            yield f"  {piece.text:12}  token {piece.number:6}, rarer than {piece.rarity:.0%}{near}"
    yield _line(word, encoders, told)
