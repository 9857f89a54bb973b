"""Words by CLIP's own vocabulary, and by the demo's model, whose rare words are known."""

from lowvram_db.concept import bare_words
from lowvram_db.concept.bare_words import Drawn
from lowvram_db.concept.identifier import check, summary
from lowvram_db.concept.suggestions import suggest
from lowvram_db.config import load
from lowvram_db.demo.tokenizer import RARE_WORDS
from lowvram_db.formats.tokens import Tokens, read_tokens
from lowvram_db.reading import AS_IT_IS
from lowvram_db.sections import DEFAULT_IDENTIFIER


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


def test_the_command(lowvram_db, clip_folder):
    code, out, err = lowvram_db("identifier", "suggest", clip_folder, "-n", "3", "--class", "dog")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 5 and out.splitlines()[-1].startswith("not near dog, in text_encoder: dog, ")


def test_words_are_ranked_by_what_the_model_draws_of_them(lowvram_db, demo, request, tmp_path, monkeypatch):
    base, found = request.config.rootpath / "lowvram_db" / "demo" / "base", [word.word for word in suggest(demo, 6)]

    def draw(model, words, sheet, reading):
        assert (model, words) == (str(base), found)
        sheet.write_bytes(b"pictures")
        return [Drawn(word, 0.1 * place, 1.0) for place, word in enumerate(reversed(words))]

    monkeypatch.setattr(bare_words, "draw_words", draw)
    code, out, err = lowvram_db("identifier", "suggest", base, "-n", "3", "--render")
    lines = [line.split() for line in out.splitlines()]
    assert (code, [line[0] for line in lines[1:4]]) == (0, found[:2:-1]), err
    assert [float(line[5]) for line in lines[1:4]] == [0.0, 0.1, 0.2]
    assert lines[4][0] == "moved:" and lines[-1] == ["pictures:", "words.png"]
    for option, words in (("--render", "--out words.png: exists already"), ("--out=a.png", "--out: is for --render")):
        code, out, err = lowvram_db("identifier", "suggest", base, option)
        assert (code, out, err.count("\n")) == (2, "", 1) and words in err
    assert (tmp_path / "words.png").read_bytes() == b"pictures"


def test_new_finds_a_word_and_says_what_it_is(lowvram_db, photos, request, tmp_path):
    base = request.config.rootpath / "lowvram_db" / "demo" / "base"
    code, _, err = lowvram_db("new", "jelly", "--photos", photos, "--class", "jellyfish", "--model", base)
    word = load(tmp_path / "jelly.toml").subject.identifier
    assert (code, word) == (0, suggest(read_tokens(str(base), AS_IT_IS), 1, "jellyfish")[0].word)
    assert f"identifier {word}: one token" in err
    assert lowvram_db("new", "its", "--photos", photos, "--class", word, "--model", base)[0] == 0
    assert load(tmp_path / "its.toml").subject.identifier != word, "the class noun is none"
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
