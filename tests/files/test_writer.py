import hashlib
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lowvram_db.files import writer
from lowvram_db.files.reader import Reader
from lowvram_db.files.writer import Planned, overflowing, write_hashed, write_tensors

DTYPES = list(writer.NAMES)


def any_tensor(dtype, shape, order):
    """Of these sizes, its memory in the order of these dimensions."""
    values = torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)
    back = [order.index(place) for place in range(len(order))]
    return values.permute(order).contiguous().permute(back)


shapes = st.lists(st.integers(0, 4), max_size=4).flatmap(
    lambda shape: st.tuples(st.just(shape), st.permutations(range(len(shape))))
)
names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@given(
    st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=6),
    st.none() | st.fixed_dictionaries({"format": st.text(max_size=8)}),
    st.integers(16, 2000),
)
def test_the_file_is_the_one_that_save_file_writes(described, metadata, at_once):
    """Whatever the strides, and however small the slices."""
    tensors = {name: any_tensor(dtype, *shape) for name, (dtype, shape) in described.items()}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        patch.setattr(writer, "_SLICE", at_once)
        checksum = write_tensors(ours, tensors, metadata=metadata)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, theirs, metadata)
        content = ours.read_bytes()
        assert content == theirs.read_bytes()
    assert checksum == zlib.crc32(content)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_floating_point_numbers_are_converted_and_others_are_not(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(writer, "_SLICE", 1000)
    shared = torch.randn(300, 40)
    tensors = {"a": shared, "b": shared[:7].to(torch.bfloat16), "same": shared, "whole": torch.arange(9)}
    write_tensors(tmp_path / "file", tensors, dtype)
    with Reader(tmp_path / "file") as file:
        assert sorted(file.names) == sorted(tensors)
        for name, tensor in tensors.items():
            wanted = tensor.to(dtype) if tensor.is_floating_point() else tensor
            assert file[name].dtype == wanted.dtype and torch.equal(file[name], wanted)


def test_a_hashed_file_names_the_sha_256_of_its_tensors_and_reads_them_one_by_one(tmp_path):
    tensors = {"b": torch.randn(3, 4), "a": torch.arange(5), "none": torch.zeros(0)}
    read = []

    def planned(name, tensor):
        return Planned(tensor.dtype, tuple(tensor.shape), lambda: read.append(name) or tensor)

    file = tmp_path / "file"
    write_hashed(file, {name: planned(name, tensor) for name, tensor in tensors.items()}, {"format": "pt"}, "hash")
    content = file.read_bytes()
    behind = 8 + int.from_bytes(content[:8], "little")
    found = f"0x{hashlib.sha256(content[behind:]).hexdigest()}"
    assert sorted(read) == sorted(tensors)
    save_file(tensors, tmp_path / "theirs")
    theirs = (tmp_path / "theirs").read_bytes()
    assert content[behind:] == theirs[8 + int.from_bytes(theirs[:8], "little") :]
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "hash": found}


def test_overflowing_counts_tensors_with_numbers_that_a_precision_lacks():
    tensors = [torch.tensor([1.0, 65504.0]), torch.tensor([65536.0]), torch.tensor([0.0, -1e9]), torch.zeros(0)]
    assert overflowing([*tensors, torch.tensor([10**9])], torch.float16) == 2
    assert overflowing(tensors, torch.bfloat16) == overflowing(tensors, torch.float32) == 0


_TENSORS = """
from pathlib import Path
import torch
from lowvram_db.files.reader import Reader
from lowvram_db.files.writer import write_tensors
tensors = {str(n): torch.ones(10 * 2**20).expand(2, -1).T for n in range(4)}  # 80 MiB each, 40 in memory
"""
_THERE_AND_BACK = """
write_tensors(Path(sys.argv[1]), tensors)
with Reader(Path(sys.argv[1])) as file:
    for name in file.names:
        assert file[name].sum().item() == 20 * 2**20
"""


def test_neither_writing_nor_reading_holds_the_file_in_memory(growth, tmp_path):
    assert growth(_TENSORS, _THERE_AND_BACK, tmp_path / "file") < 240  # MiB
    assert (tmp_path / "file").stat().st_size > 320 * 2**20
