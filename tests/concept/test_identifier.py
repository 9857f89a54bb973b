"""Words by CLIP's own vocabulary, where it is at hand, and by the demo's model, whose rare words are known."""

import numpy as np
import pytest

from lowvram_db.concept.identifier import Lexicon, check, meant, summary
from lowvram_db.errors import UserError


@pytest.mark.parametrize(
    ("word", "numbers", "words"),
    [
        ("sks", [48136], "one token (48136), rarer than 97% of the vocabulary; no meaning of its own"),
        ("ohwx", [47993], "one token (47993), rarer than 97% of the vocabulary; no meaning of its own"),
        ("pkblz", [10149, 833, 345], "3 tokens (pk bl z); no meaning of its own"),
        ("pokeeee", [6892, 9361], "2 tokens (poke eee); poke has a meaning by itself"),
        ("dog", [1929], "it has a meaning already, which the subject would start from"),
        ("💟", [28828], "it has a meaning already"),
        ("👨‍👩‍👧", None, "4 tokens (👨‍ 👩‍ <f0 9f 91> <a7>)"),
        ("שלום", None, "8 tokens (<d7> <a9>"),
    ],
)
def test_words_are_told_as_clip_reads_them(clip, word, numbers, words):
    (told,) = check(word, clip)
    assert numbers is None or [piece.number for piece in told.pieces] == numbers
    assert words in summary(word, clip)
    assert "\n" not in summary(word, clip)


@pytest.mark.parametrize("typed", ["ðŁĴŁ", "ðŁĴŁ</w>", "ðŸ’Ÿ"])
def test_the_spelling_of_an_emoji_is_not_the_emoji(clip, typed):
    """A blog's famous identifier: as the vocabulary spells its bytes, and as a program does that takes them wrongly."""
    assert meant(typed, clip[0]) == "💟"
    assert summary(typed, clip).endswith("as typed it is the spelling of 💟 (U+1F49F), one token (28828): type 💟")
    assert len(check("ðŁĴŁ", clip)[0].pieces) == 7


@pytest.mark.parametrize("typed", ["ohwx", "naïve", "é", "💟", "a b", "שלום", "dog</w"])
def test_words_that_are_what_they_seem_are_left_alone(clip, typed):
    assert meant(typed, clip[0]) is None


def test_what_ends_a_word_in_the_vocabulary_is_not_typed(clip):
    assert meant("sks</w>", clip[0]) == "sks"


def test_words_of_a_like_meaning_are_named(demo):
    """The demo's model has learnt them from pictures: its nearest are what its captions use alike."""
    (told,) = check("striped", demo)
    assert told.pieces[0].near[0] == "stripes"
    (red,) = check("yellow", demo, "orange")
    assert red.beside_class and not red.is_rare


def test_closeness_is_the_mean_cosine_with_the_three_nearest_words(demo):
    lexicon, (tokens, merges), table = Lexicon(demo[0]), demo[0].vocabulary, demo[0].embedding.astype(np.float64)
    made = {merge.replace(" ", "") for merge in merges}
    words = [number for token, number in tokens.items() if token in made and token.removesuffix("</w>").isalpha()]
    words = [number for number in words if demo[0].names[number].endswith("</w>")]
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    asked = [*words[:5], *words[-5:]]
    wanted = [np.sort([unit[one] @ unit[other] for other in words if other != one])[-3:].mean() for one in asked]
    np.testing.assert_allclose(lexicon.closeness(asked), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("ohwx " * 80, "a prompt has 75; shorten it"),
        ("<|endoftext|>", "is no word to this model's tokenizer"),
        ("x\x07", "an invisible character in it (U+0007)"),
        ("Dog", "is the class noun itself"),
        ("of", "stands in nearly every prompt"),
    ],
)
def test_a_word_that_can_name_no_subject_is_refused(clip, word, words):
    with pytest.raises(UserError) as caught:
        check(word, clip, "dog")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_command(lowvram_db, clip_folder):
    code, out, err = lowvram_db("identifier", "check", clip_folder, "pokeeee")
    assert (code, err) == (0, "")
    assert "  poke          token   6892, rarer than 13%; near " in out
    assert out.splitlines()[-1].startswith("identifier pokeeee: 2 tokens (poke eee); poke has a meaning by itself")
    code, out, err = lowvram_db("identifier", "check", clip_folder, "dog", "--class", "dog")
    assert (code, out, err.count("\n")) == (2, "", 1)
