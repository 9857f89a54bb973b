import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lowvram_db.errors import UserError
from lowvram_db.formats.header import Header


def write(path, header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, dtype="F16", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 2] if shape is None else shape, "data_offsets": [begin, end]}


REFUSED = {
    "empty": (b"", "is empty"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
    "a web page": (b"<!DOCTYPE html><html>", "is a web page"),
    "GGUF": (b"GGUF\3\0\0\0" + b"\0" * 64, "is a GGUF file"),
    "a zip": (b"PK\3\4" + b"\0\0\x08\x08" * 8, "is a pickle by its content"),
    "shorter than a length": (b"\1\0\0", "ends within its header"),
    "cut within the header": ((200).to_bytes(8, "little") + b"{}", "ends within its header"),
    "a header of 100 MB": ((100_000_000).to_bytes(8, "little") + b"{}", "claims a header of 100 MB"),
    "no text": (b"\xff\xfe", "is no text"),
    "no JSON": (b"{,}", "is no JSON"),
    "nested": (b'{"a":' * 30_000, "nested too deeply|is no JSON"),
    "a list": ([], "is no JSON object"),
    "no tensor": ({}, "has no tensor"),
    "a name twice": (b'{"a":{"dtype":"F16","shape":[4],"data_offsets":[0,8]},"a":{}}', "has 'a' twice"),
    "metadata": ({"__metadata__": {"a": 1}, "a": entry(0, 8)}, "metadata in its header are not texts"),
    "no offsets": ({"a": {"dtype": "F16", "shape": [4]}}, "no dtype, shape and two offsets for 'a'"),
    "one offset": ({"a": entry(0, 8) | {"data_offsets": [0]}}, "no dtype, shape and two offsets for 'a'"),
    "not an object": ({"a": 7}, "no dtype, shape and two offsets for 'a'"),
    "a dtype of no one": ({"a": entry(0, 8, "F7")}, "of a kind 'F7' that is not known"),
    "a shape below zero": ({"a": entry(0, 8, shape=[-2, -2])}, "'a' has no shape and offsets"),
    "a shape of fractions": ({"a": entry(0, 8, shape=[4.0])}, "'a' has no shape and offsets"),
    "a shape that overflows": ({"a": entry(0, 8, shape=[2**32, 2**32])}, "'a' has 8 bytes, which its shape"),
    "another shape": ({"a": entry(0, 8, shape=[5])}, "'a' has 8 bytes, which its shape"),
    "overlapping": ({"a": entry(0, 6), "b": entry(4, 8)}, "'a' and 'b' overlap by 2 bytes"),
    "the same bytes": ({"a": entry(0, 8), "b": entry(0, 8)}, "'a' and 'b' overlap by 8 bytes"),
    "a hole": ({"a": entry(0, 2), "b": entry(4, 8)}, "'a' and 'b' have 2 bytes between them"),
    "a late beginning": ({"a": entry(2, 8)}, "begins after 2 bytes"),
    "cut short": ({"a": entry(0, 3_000_000)}, "3.0 MB of its 3.0 are missing"),
    "too long": ({"a": entry(0, 6)}, "2 bytes at its end belong to no tensor"),
    "no character": (b'{"\\ud800":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}', "no dtype, shape and two"),
}  # fmt: skip
_AS_IT_IS = {"empty", "a pointer", "a web page", "GGUF", "a zip", "shorter than a length", "cut within the header",
             "a header of 100 MB"}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named_in_one_line(tmp_path, case):
    content, words = REFUSED[case]
    path = tmp_path / "model.safetensors"
    if case in _AS_IT_IS:
        path.write_bytes(content)
    else:
        write(path, content)
    with pytest.raises(UserError, match=words) as refused:
        Header(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert str(refused.value).isprintable()


def test_it_says_what_the_format_s_own_reader_says(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.zeros(0), "c": torch.arange(5), "d": torch.tensor(1.0).bfloat16()}
    save_file(tensors, tmp_path / "file", {"title": "ü"})
    header = Header(tmp_path / "file")
    assert header.metadata == {"title": "ü"}
    content = (tmp_path / "file").read_bytes()
    with safe_open(tmp_path / "file", framework="pt") as opened:
        assert set(header.entries) == set(opened.keys())
        for name, (dtype, shape, begin, end) in header.entries.items():
            assert (dtype, list(shape)) == (opened.get_slice(name).get_dtype(), opened.get_slice(name).get_shape())
            stored = opened.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
            assert content[header.size :][begin:end] == stored


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_the_numbers_of_a_small_tensor(tmp_path, dtype):
    numbers = torch.linspace(-2, 300, 7).to(dtype)
    save_file({"a": numbers, "b": torch.ones(3)}, tmp_path / "file")
    wanted = numbers.tolist() if dtype.is_floating_point else []
    assert Header(tmp_path / "file").numbers("a") == wanted


_MODEL = {"a": torch.arange(6).reshape(2, 3).half(), "b": torch.ones(4), "v_pred": torch.zeros(0)}


@given(st.data())
def test_nothing_passes_that_the_format_s_own_reader_refuses(tmp_path_factory, data):
    """Any byte of the header is any other, or the file ends early or late."""
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    save_file(_MODEL, path, {"format": "pt"})
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 41), min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    end = data.draw(st.sampled_from([len(content), len(content), len(content) - 1, 7, 30]))
    path.write_bytes(bytes(content[:end]) + data.draw(st.sampled_from([b"", b"", b"\0"])))
    try:
        header = Header(path)
    except UserError as refused:
        assert str(refused).isprintable()
        return
    with safe_open(path, framework="pt") as opened:  # raises SafetensorError for what it refuses
        for name in header.entries:
            opened.get_tensor(name)


def test_the_format_s_own_reader_refuses_what_is_refused_here_as_false(tmp_path):
    for case in ("a name twice", "overlapping", "a hole", "too long", "another shape"):
        with pytest.raises(SafetensorError), safe_open(write(tmp_path / "file", REFUSED[case][0]), framework="pt"):
            pass
