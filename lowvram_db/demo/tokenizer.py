"""A byte-level BPE tokenizer in CLIP's own format, trained on the world's captions.

Ordinary words become one token each; invented names stay in pieces, because each name is seen too rarely to be merged.
The last merges come from a list of rare words that no caption holds: the tail of the vocabulary, for identifiers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from random import Random

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from lowvram_db.demo.captions import caption
from lowvram_db.demo.world import training_scene

MAX_LENGTH = 32
MIN_FREQUENCY = 90  # above any single name's count, below every ordinary word's
SAMPLE = 16_000
START, END = "<|startoftext|>", "<|endoftext|>"
RARE_WORDS = (
    "sks",
    "ohwx",
    "zwx",
    "qlt",
    "vbn",
    "xjy",
    "kpf",
    "wqz",
    "jhn",
    "ufq",
    "ptx",
    "hgb",
    "dvk",
    "yqc",
    "ncz",
    "lwj",
)


def _corpus() -> Iterable[str]:
    for seed in range(SAMPLE):
        yield caption(training_scene(seed), Random(seed))
    for word in RARE_WORDS:
        yield from [word] * MIN_FREQUENCY


def train_tokenizer() -> CLIPTokenizer:
    """Learns the merges and hands them to transformers' CLIPTokenizer (model_max_length MAX_LENGTH)."""
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=MIN_FREQUENCY,
        end_of_word_suffix="</w>",
        initial_alphabet=letters,
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    with tempfile.TemporaryDirectory() as folder:  # the files of CLIP's original format: read alike by all versions
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH, pad_token=END)


def name_pieces(tokenizer: CLIPTokenizer, names: Iterable[str]) -> list[int]:
    """The ids of all pieces that these words are made of, sorted."""
    pieces: set[int] = set()
    for name in names:
        pieces.update(tokenizer(name, add_special_tokens=False)["input_ids"])
    return sorted(pieces)
