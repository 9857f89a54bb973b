import pytest

from lowvram_db.wording import identifier_problem, template_fields


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("a\tb", "invisible character in it (U+0009)"),
        ("ohwx\u200f", "invisible character in it (U+200F)"),
        ("\u200b", "invisible character in it (U+200B)"),
        ("oh\udcffwx", "invisible character in it (U+DCFF)"),
        ("\u200d", "nothing in it that is seen"),
        ("\ufe0f \u2800\u3164", "nothing in it that is seen"),
        ("Dog ", "is the class noun itself"),
        ("the", "stands in nearly every prompt"),
        ("Photo", "stands in nearly every prompt"),
        ("{identifier}", "has {identifier} in it, which is the place for a word in a prompt; type the word itself"),
        ("my { Class }", "has { Class } in it"),
    ],
)
def test_a_word_that_can_name_no_subject_is_told_why(word, problem):
    assert problem in identifier_problem(word, "dog")


@pytest.mark.parametrize(
    "word", ["ohwx", "my ohwx", "💟", "👨\u200d👩\u200d👧", "❤\ufe0f", "שלום", "犬", "naïve", "{ohwx}", "class"]
)
def test_other_words_are_taken(word):
    assert identifier_problem(word, "dog") is None


@pytest.mark.parametrize(("word", "noun"), [("me\u0301duse", "m\u00e9duse"), ("m\u00e9duse", "Me\u0301duse ")])
def test_a_noun_is_the_same_however_it_is_typed(word, noun):
    assert "is the class noun itself" in identifier_problem(word, noun)


def test_what_a_template_asks_for():
    assert template_fields("a {identifier} {class} {{as it is}}") == {"identifier", "class"}
    assert template_fields("plain") == set()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a {identifier", "is written twice"),
        ("a } b", "is written twice"),
        ("a {identifier:>99999999999}", "alone, without : or !"),  # 93 GiB of spaces
        ("a {class!z}", "alone, without : or !"),
    ],
)
def test_braces_that_hold_no_name_are_refused(template, words):
    with pytest.raises(ValueError, match=words):
        template_fields(template)
