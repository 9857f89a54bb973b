import re

import pytest

from lowvram_db.errors import UserError
from lowvram_db.evaluate.prompts import prompts_for, read_prompts


@pytest.mark.parametrize(("noun", "title"), [("teapot", "Object Prompts"), ("poodle dog", "Live Subject Prompts")])
def test_the_papers_prompts_are_those_of_its_data(dog_photos, noun, title):
    text = (dog_photos.parent / "prompts_and_classes.txt").read_text()
    listed = re.findall(r"'(.*?)'\.format", text.split(title)[1])[:25]
    assert prompts_for(noun) == [line.replace("{0}", "{identifier}").replace("{1}", "{class}") for line in listed]


def test_every_kind_has_twenty_five():
    for noun in ("teapot", "dog"):
        assert len(set(prompts_for(noun))) == 25


def test_a_file_of_prompts_is_read(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "\ufeffa {identifier} {class} on Mars\n\n  {identifier} asleep \r\na {identifier} {class} on Mars\n", "utf-8"
    )
    assert read_prompts(path) == ["a {identifier} {class} on Mars", "{identifier} asleep"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a {identifier}\na {class}\n", "line 2: 'a {class}' has to name the subject"),
        (b"a {identifier} {colour}\n", "line 1"),
        (b"a {identifier\n", "line 1"),
        (b" \n\n", "holds no prompt"),
        (b"\xff\xfe\x00a", "cannot be read as text"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, said):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        read_prompts(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt"):
        read_prompts(tmp_path / "none.txt")
