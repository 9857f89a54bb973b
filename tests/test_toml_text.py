import codecs
import json

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.errors import UserError
from lowvram_db.toml_text import parse, read

TEXT = 'photos = "Fotos/Müller 犬"\nsteps = 3\n'
TREE = {"photos": "Fotos/Müller 犬", "steps": 3}


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
        codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.replace(" = ", "\t=\t").encode(),
    ],
)
def test_a_file_is_read_as_editors_and_shells_write_it(tmp_path, content):
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    assert parse(read(path), path) == TREE


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'\nname = "caf\xe9"', "line 2 is not in UTF-8; save it as UTF-8 text"),
        (TEXT.encode("utf-16-le"), "save it as UTF-8 text"),
        (codecs.BOM_UTF16_LE + b"odd", "save it as UTF-8 text"),
        (b"\x7fELF\0\0", "has zero bytes in it"),
        (b"#" * (2**20 + 1), "too large to be a run's settings"),
    ],
)
def test_what_is_no_text_says_what_to_save(tmp_path, content, said):
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.toml: ") as caught:
        read(tmp_path / "a.toml")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"), [("none.toml", "no such file"), (".", "is a folder"), ("\0", "cannot be rea")]
)
def test_what_is_no_file_is_named(tmp_path, name, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('a = 1\nphotos = "C:\\Users\\me"', 'line 2: in "double quotes" a backslash begins an escape; write the path'),
        ('photos = "C:\\photos"', 'line 1: in "double quotes" a backslash'),
        ('photos = "C:\\fotos\\"\nb = 2', 'line 1: in "double quotes" a backslash'),
        ("name = “dog”", "line 1: has curly quotes; write straight ones"),
        ("steps = 1\nsteps = 2", "line 2: sets again what stands further up"),
        ("[train]\n[train]", "line 2: sets again what stands further up"),
        ("photos = /home/me", 'line 1: photos = /home/me: text stands in "quotes"'),
        ("flip = True", "true and false are written small"),
        ("[train\nsteps = 3", "at line 1"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "9" * 5000, "digits"),
        ("a = '\udcff'", "is no character"),
    ],
)
def test_what_is_no_toml_says_where_and_how_to_mend_it(tmp_path, text, said):
    with pytest.raises(UserError, match=r"a\.toml: ") as caught:
        parse(text, tmp_path / "a.toml")
    assert said in str(caught.value)


@given(text=st.text(st.characters(codec="utf-8")), mark=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_any_text_comes_back_from_any_encoding(tmp_path, text, mark):
    path = tmp_path / "any.toml"
    path.write_bytes(tomli_w.dumps({"text": text}).encode(mark))
    assert parse(read(path), path) == {"text": text}


@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: json.dumps(text).encode())))
def test_any_bytes_are_taken_or_refused_in_one_line(tmp_path, content):
    path = tmp_path / "any.toml"
    path.write_bytes(b"a = 1\nb = " + content)
    try:
        assert parse(read(path), path)["a"] == 1
    except UserError as error:
        assert str(error).startswith(str(path)) and str(error).count(str(path)) == 1
