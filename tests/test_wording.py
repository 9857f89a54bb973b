import pytest

from lowvram_db.wording import identifier_problem


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("a\tb", "invisible character in it (U+0009)"),
        ("ohwx\u200f", "invisible character in it (U+200F)"),
        ("\u200b", "invisible character in it (U+200B)"),
        ("oh\udcffwx", "invisible character in it (U+DCFF)"),
        ("Dog ", "is the class noun itself"),
        ("the", "stands in nearly every prompt"),
        ("Photo", "stands in nearly every prompt"),
    ],
)
def test_a_word_that_can_name_no_subject_is_told_why(word, problem):
    assert problem in identifier_problem(word, "dog")


@pytest.mark.parametrize("word", ["ohwx", "my ohwx", "💟", "👨\u200d👩\u200d👧", "❤\ufe0f", "שלום", "犬", "naïve"])
def test_other_words_are_taken(word):
    assert identifier_problem(word, "dog") is None
