"""Does what a model draws of a word alone tell whether it knows the word?

    python bench/bare_words.py

Draws, with the demo's base model, rare words of its vocabulary, names of individuals that it has learnt, and words of
its captions, as `identifier suggest --render` does, and appends a row a word to bench/results/bare_words.csv.
"""

import tempfile
from pathlib import Path

from demo_learning import CONFIG
from machine import add_row

from lowvram_db.concept.bare_words import draw_words
from lowvram_db.config import load
from lowvram_db.demo.names import individuals
from lowvram_db.demo.tokenizer import RARE_WORDS

KINDS = {
    "rare": RARE_WORDS[:8],
    "name": [one.name for one in individuals("jellyfish")[:8]],
    "noun": ["jellyfish", "mug", "tree", "car"],
    "setting": ["sea", "snow", "night", "desert"],
}


def main() -> None:
    kinds = {word: kind for kind, words in KINDS.items() for word in words}
    with tempfile.TemporaryDirectory() as folder:
        drawn = draw_words(load(CONFIG).model.name, list(kinds), Path(folder, "words.png"))
    for one in drawn:
        figures = {"moved": f"{one.moved:.3f}", "spread": f"{one.spread:.3f}"}
        add_row("bare_words", {"kind": kinds[one.word], "word": one.word, **figures})


if __name__ == "__main__":
    main()
