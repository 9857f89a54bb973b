"""The tokens that a model's text encoders read, and what each is to it: no other weight is read, and no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from lowvram_db.errors import UserError
from lowvram_db.formats.content import content_of
from lowvram_db.formats.header import Described, Header
from lowvram_db.formats.inspect import described
from lowvram_db.formats.names import CLIP_PREFIX
from lowvram_db.formats.source import find_texts
from lowvram_db.formats.tokenizer import END, START, Vocabulary, find_vocabulary, read_vocabulary
from lowvram_db.formats.weight_files import weight_files
from lowvram_db.reading import AS_IT_IS, Reading

ENDS_A_WORD = "</w>"
_TABLE = "embeddings.token_embedding.weight"
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # numpy has no bfloat16
# What is one word to CLIP: letters, a single digit, what is neither, or the end of an English one.
_WORD = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


@dataclass(frozen=True)
class Tokens:
    """Of one text encoder."""

    part: str  # its name in the model folder
    vocabulary: Vocabulary
    embedding: np.ndarray  # float32 [tokens, width]

    def read(self, text: str) -> list[int]:
        """The numbers of a text's tokens, without those that begin and end a prompt."""
        return list(self._reader.encode(text, add_special_tokens=False).ids)

    @cached_property
    def names(self) -> dict[int, str]:
        """Tokens by their numbers, as the vocabulary spells them."""
        return {number: token for token, number in self.vocabulary.tokens.items()}

    @cached_property
    def _reader(self) -> Tokenizer:
        """As transformers' CLIPTokenizer, which would take seconds to import."""
        tokens, merges = self.vocabulary
        pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
        reader = Tokenizer(models.BPE(tokens, pairs, end_of_word_suffix=ENDS_A_WORD, unk_token=END))
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        reader.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
        reader.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        reader.add_special_tokens([START, END])
        return reader


def read_tokens(name: str, reading: Reading = AS_IT_IS) -> list[Tokens]:
    """Of every text encoder of a model, by its folder, file or hub id. Raises UserError naming what is wrong there."""
    place = Path(name).expanduser()
    tables = _of_file(place, reading) if place.is_file() else _of_folder(find_texts(name, reading))
    found = list(tables)
    if not found:
        raise UserError(f"{place}: has no text encoder of CLIP's kind; name a whole Stable Diffusion model")
    for tokens in found:
        if max(tokens.vocabulary.tokens.values()) >= len(tokens.embedding):
            raise UserError(
                f"{place}: its tokenizer has {len(tokens.vocabulary.tokens)} tokens, {tokens.part} knows "
                f"{len(tokens.embedding)}; they are of different models"
            )
    return found


def _of_folder(folder: Path) -> Iterator[Tokens]:
    for part, tokenizer in _TOKENIZERS.items():
        if (folder / part).is_dir():
            for path in weight_files(folder, part):
                file = described(path)
                if key := next((key for key in file.entries if key.removeprefix(CLIP_PREFIX) == _TABLE), None):
                    yield Tokens(part, read_vocabulary(folder / tokenizer), _table(file, key))


def _of_file(path: Path, reading: Reading) -> Iterator[Tokens]:
    file = described(path)
    for part, places in content_of(file).parts.items():
        if part in _TOKENIZERS and (place := places.get(CLIP_PREFIX + _TABLE)):
            table = _table(file, place.key)
            yield Tokens(part, find_vocabulary(path, reading.tokenizer, len(table)), table)


def _table(file: Described, key: str) -> np.ndarray:
    """float32 [tokens, width], finite."""
    entry = file.entries[key]
    if entry.dtype not in _STORED or len(entry.shape) != 2:
        raise UserError(f"{file.path}: {key} is stored as {entry.dtype} {entry.shape}, which is no table of numbers")
    if isinstance(file, Header):
        stored = np.fromfile(file.path, _STORED[entry.dtype], entry.numel, offset=file.size + entry.begin)
        if entry.dtype == "BF16":  # float32 without its last two bytes
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = np.array(file.numbers(key))
    table = stored.astype(np.float32, copy=False).reshape(entry.shape)
    if not np.isfinite(table.sum()):
        raise UserError(f"{file.path}: {key} holds numbers that are not finite; the file is damaged")
    return table
