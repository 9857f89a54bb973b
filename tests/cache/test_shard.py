import random

import pytest
import torch
from safetensors.torch import load_file

from lowvram_db.cache.shard import Damaged, Shard, write_shard
from lowvram_db.errors import UserError

KEYS = [f"{number:064x}" for number in range(3)]


def entries(seed=0):
    torch.manual_seed(seed)
    return {key: {"mean": torch.randn(4, 3, 5), "logvar": torch.randn(5, 3).T, "count": torch.tensor([seed])}
            for key in KEYS}  # fmt: skip


def test_safetensors_own_reader_finds_the_same(tmp_path):
    written = entries()
    loaded = load_file(write_shard(tmp_path, written).path)
    assert len(loaded) == 9
    for key, entry in written.items():
        for name, tensor in entry.items():
            assert torch.equal(loaded[f"{key}.{name}"], tensor)


def whole_keys(path):
    """The keys whose entries are whole, by a reader that knows nothing yet."""
    try:
        shard = Shard(path)
    except Damaged:
        return set()
    whole = {key for key, entry in shard.entries.items() if shard.is_whole(entry)}
    shard.close()
    return whole


def spans_of(shard):
    return {key: [(span.start, span.stop) for span in entry.tensors.values()] for key, entry in shard.entries.items()}


def test_a_flip_of_any_bit_anywhere_costs_the_entry_it_is_in(tmp_path):
    """Every byte of a whole file, one bit of each: header and entries."""
    shard = write_shard(tmp_path, entries())
    content, spans = shard.path.read_bytes(), spans_of(shard)
    header = min(start for key in KEYS for start, _ in spans[key])
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.Random(place).randrange(8)
        shard.path.write_bytes(damaged)
        hit = {key for key in KEYS if any(start <= place < stop for start, stop in spans[key])}
        assert len(hit) == (place >= header)
        assert whole_keys(shard.path) == (set(KEYS) - hit if place >= header else set())


def test_a_truncation_costs_what_was_cut_off(tmp_path):
    shard = write_shard(tmp_path, entries())
    content, spans = shard.path.read_bytes(), spans_of(shard)
    header = min(start for key in KEYS for start, _ in spans[key])
    for length in range(len(content)):
        shard.path.write_bytes(content[:length])
        left = {key for key in KEYS if all(stop <= length for _, stop in spans[key])} if length >= header else set()
        assert whole_keys(shard.path) == left


def test_a_file_under_another_ones_name_is_not_believed(tmp_path):
    one, other = write_shard(tmp_path, entries(0)), write_shard(tmp_path, entries(1))
    one.path.write_bytes(other.path.read_bytes())
    with pytest.raises(Damaged, match="damaged header"):
        Shard(one.path)


def test_a_full_disk_leaves_nothing_behind(small_disk):
    disk = small_disk("100k")
    first = write_shard(disk, {KEYS[0]: {"mean": torch.zeros(10_000)}})
    with pytest.raises(UserError, match="the disk is full"):
        write_shard(disk, {KEYS[1]: {"mean": torch.ones(20_000)}})
    assert list(disk.iterdir()) == [first.path]
    assert whole_keys(first.path) == {KEYS[0]}
