"""Words by CLIP's own vocabulary, where it is at hand, and by the demo's model, whose rare words are known."""

import numpy as np
import pytest

from lowvram_db.concept.identifier import check, meant, suggest, summary
from lowvram_db.config import load
from lowvram_db.demo.tokenizer import RARE_WORDS
from lowvram_db.errors import UserError
from lowvram_db.formats.reading import AS_IT_IS
from lowvram_db.formats.tokenizer import read_vocabulary
from lowvram_db.formats.tokens import Tokens, read_tokens
from lowvram_db.sections import DEFAULT_IDENTIFIER


@pytest.fixture(scope="module")
def clip(clip_vocabulary):
    """CLIP's vocabulary, with an embedding that means nothing."""
    vocabulary = read_vocabulary(clip_vocabulary)
    table = np.random.default_rng(0).random((len(vocabulary.tokens), 16), dtype=np.float32) - 0.5
    return [Tokens("text_encoder", vocabulary, table)]


@pytest.fixture(scope="module")
def demo(request):
    return read_tokens(str(request.config.rootpath / "lowvram_db" / "demo" / "base"))


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


def test_what_is_suggested_is_rare_one_token_and_no_word(clip):
    found = suggest(clip, 50, "dog")
    assert len(found) == 50 and len({word.word for word in found}) == 50
    for word in found:
        assert clip[0].read(word.word) == [word.number]
        assert word.rarity >= 0.8
        assert not set(word.word) & set("aeiouy")
        assert check(word.word, clip, "dog")[0].is_rare


def test_the_demos_rare_words_are_suggested_and_its_words_are_not(demo):
    found = [word.word for word in suggest(demo, 10, "jellyfish")]
    assert len(set(found) & set(RARE_WORDS)) >= 8, found
    assert all(word.rarity >= 0.8 for word in suggest(demo, 200))


def test_a_word_that_training_has_hardly_touched_comes_earlier(clip):
    found = [word.word for word in suggest(clip, 200)]
    word = found[100]
    for size, earlier in ((0.01, True), (100, False)):
        table = clip[0].embedding.copy()
        table[clip[0].read(word)] *= size
        now = [other.word for other in suggest([Tokens("text_encoder", clip[0].vocabulary, table)], 200)]
        assert (now.index(word) < 100) == earlier


def test_words_of_a_like_meaning_are_named(demo):
    """The demo's model has learnt them from pictures: its nearest are what its captions use alike."""
    (told,) = check("striped", demo)
    assert told.pieces[0].near[0] == "stripes"
    (red,) = check("yellow", demo, "orange")
    assert red.beside_class and not red.is_rare


def test_what_lies_beside_the_class_noun_is_not_suggested(clip):
    """An embedding in which a word that is else the best of all is nearly the noun."""
    best, noun = suggest(clip, 1)[0], clip[0].read("dog")[0]
    table = clip[0].embedding.copy()
    table[best.number] = 0.01 * table[noun] + 1e-6
    moved = [Tokens("text_encoder", clip[0].vocabulary, table)]
    assert best.word in {word.word for word in suggest(moved, 200)}
    assert best.word not in {word.word for word in suggest(moved, 200, "dog")}
    assert summary(best.word, moved, "dog").endswith("it lies beside the class noun")


def test_all_text_encoders_have_a_say(clip):
    """To the second one of them the first one's best word is a neighbour of the class noun."""
    best, noun = suggest(clip, 1, "dog")[0], clip[0].read("dog")[0]
    table = clip[0].embedding.copy()
    table[best.number] = table[noun]
    both = [*clip, Tokens("text_encoder_2", clip[0].vocabulary, table)]
    assert best.word not in {word.word for word in suggest(both, 200, "dog")}
    assert "no meaning of its own / one token" in summary(best.word, both, "dog")


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


@pytest.fixture
def folder(clip_vocabulary, clip, tmp_path):
    """A model folder of which nothing is there but what is asked for."""
    from safetensors.numpy import save_file

    (tmp_path / "clip" / "text_encoder").mkdir(parents=True)
    (tmp_path / "clip" / "tokenizer").symlink_to(clip_vocabulary)
    save_file(
        {"text_model.embeddings.token_embedding.weight": clip[0].embedding},
        tmp_path / "clip" / "text_encoder" / "model.safetensors",
    )
    return tmp_path / "clip"


def test_the_commands(lowvram_db, folder):
    code, out, err = lowvram_db("identifier", "suggest", folder, "-n", "3", "--class", "dog")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 5 and out.splitlines()[-1].startswith("not near dog, in text_encoder: dog, ")
    code, out, err = lowvram_db("identifier", "check", folder, "pokeeee")
    assert (code, err) == (0, "")
    assert "  poke          token   6892, rarer than 13%; near " in out
    assert out.splitlines()[-1].startswith("identifier pokeeee: 2 tokens (poke eee); poke has a meaning by itself")
    code, out, err = lowvram_db("identifier", "check", folder, "dog", "--class", "dog")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_new_finds_a_word_and_says_what_it_is(lowvram_db, photos, folder, request, tmp_path):
    base = request.config.rootpath / "lowvram_db" / "demo" / "base"
    code, _, err = lowvram_db("new", "jelly", "--photos", photos, "--class", "jellyfish", "--model", base)
    word = load(tmp_path / "jelly.toml").subject.identifier
    assert (code, word) == (0, suggest(read_tokens(str(base), AS_IT_IS), 1, "jellyfish")[0].word)
    assert f"identifier {word}: one token" in err
    code, _, err = lowvram_db(
        "new", "ball", "--photos", photos, "--class", "ball", "--model", base, "--identifier", "stripes"
    )
    assert code == 0 and "identifier stripes: one token (656)" in err and "a meaning already" in err
    assert load(tmp_path / "ball.toml").subject.identifier == "stripes"


def test_new_knows_a_word_for_a_model_that_is_elsewhere_or_has_no_rare_one(lowvram_db, photos, miniature, tmp_path):
    for name, model in (("hub", "stable-diffusion-v1-5/stable-diffusion-v1-5"), ("letters", miniature)):
        assert lowvram_db("new", name, "--photos", photos, "--class", "dog", "--model", model)[0] == 0
        assert load(tmp_path / f"{name}.toml").subject.identifier == DEFAULT_IDENTIFIER
    code, _, err = lowvram_db("identifier", "suggest", miniature)
    assert code == 2 and "its vocabulary has no rare word of one token" in err
    assert err.count("\n") == 1
