import torch

from lowvram_db.cache.store import Store


def test_what_is_put_is_got(tmp_path):
    store = Store(tmp_path / "cache")
    assert store.get("ab") is None
    tensors = {"mean": torch.randn(4, 8, 8), "logvar": torch.randn(8, 4).T}
    store.put("ab", tensors)
    got = Store(tmp_path / "cache").get("ab")
    assert got is not None
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)


def test_leftovers_of_a_killed_process_are_swept(tmp_path):
    (tmp_path / ".ab.safetensors.partial-01234567").write_bytes(b"half")
    Store(tmp_path)
    assert not list(tmp_path.iterdir())
