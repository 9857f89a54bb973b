import numpy as np
import pytest
from PIL import Image

from lowvram_db.concept import bare_words
from lowvram_db.concept.bare_words import Drawn, compared, draw_words


def flat(*greys):
    return [Image.new("RGB", (32, 32), (grey,) * 3) for grey in greys]


@pytest.mark.parametrize(
    ("pictures", "moved", "spread"),
    [
        (flat(0, 100, 200), 0.0, 1.0),
        (flat(30, 130, 230), 0.225, 1.0),  # by 30 of the 133 that the plain ones lie apart
        (flat(100, 100, 100), 0.5, 0.0),
        (flat(0, 50, 100), 0.375, 0.5),
    ],
)
def test_a_word_is_measured_by_what_it_does_to_pictures_of_no_words(pictures, moved, spread):
    told = compared("x", pictures, flat(0, 100, 200))
    assert (told.moved, told.spread) == (pytest.approx(moved), pytest.approx(spread))


def test_pictures_are_compared_with_those_of_the_same_noise():
    assert compared("x", flat(200, 100, 0), flat(0, 100, 200)) == Drawn("x", pytest.approx(1.0), pytest.approx(1.0))


def test_a_word_with_a_meaning_comes_after_rare_ones(request, tmp_path, monkeypatch):
    monkeypatch.setattr(bare_words, "_STEPS", 4)
    monkeypatch.setattr(bare_words, "_SEEDS", 2)
    base = str(request.config.rootpath / "lowvram_db" / "demo" / "base")
    rare, known = draw_words(base, ["snow", "sks"], tmp_path / "words.png")
    assert (rare.word, known.word) == ("sks", "snow")
    assert rare.moved < 0.1 and known.moved > 0.5 and rare.spread == pytest.approx(1, abs=0.1)
    with Image.open(tmp_path / "words.png") as sheet:
        tops = range(sheet.height - 3 * 68, sheet.height, 68)  # rows of 64 pixels, and what is between them
        no_words, sks, snow = (np.asarray(sheet, dtype=float)[top : top + 64, -68:-4] for top in tops)
    assert np.abs(sks - no_words).mean() < 10 < np.abs(snow - no_words).mean()
