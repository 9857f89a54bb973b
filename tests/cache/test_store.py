import multiprocessing
import random
import resource
import subprocess
import time

import psutil
import pytest
import torch

from lowvram_db.cache import Store, shard, store
from lowvram_db.errors import UserError


def key(number):
    return f"{number:064x}"


def entry(number, side=8):
    torch.manual_seed(number)
    return {"mean": torch.randn(4, side, side), "logvar": torch.randn(4, side, side)}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def fill(folder, numbers, shards=1):
    numbers = list(numbers)
    with Store(folder) as opened:
        for part in range(shards):
            for number in numbers[part::shards]:
                opened.put(key(number), entry(number))
            opened.flush()


def shards_of(folder):
    return sorted(folder.glob("v*/*.safetensors"))


def whole(folder, numbers):
    """Which of these entries a freshly opened store has; each must be the one that was put."""
    with Store(folder, writable=False) as opened:
        found = {number for number in numbers if (got := opened.get(key(number))) is not None and same(got, number)}
        assert found == {number for number in numbers if opened.holds(key(number))}
        return found


def same(got, number):
    wanted = entry(number)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted), "another entry than the one that was put"
    return True


def test_what_is_put_is_got(folder):
    fill(folder, range(5), shards=2)
    with Store(folder) as opened:
        assert len(shards_of(folder)) == 2
        assert all(same(opened.get(key(number)), number) for number in range(5))
        assert opened.get(key(9)) is None
        batch = opened.stack([key(3), key(0), key(3)])
        assert torch.equal(batch["mean"], torch.stack([entry(number)["mean"] for number in (3, 0, 3)]))
        with pytest.raises(KeyError):
            opened.stack([key(0), key(9)])


def test_any_layout_and_dtype(folder):
    tensors = {"a": torch.randn(8, 4).T, "b": torch.randn(3).bfloat16(), "c": torch.arange(4), "d": torch.tensor(1.0)}
    with Store(folder) as opened:
        opened.put(key(0), tensors)
        got = opened.get(key(0))
    assert all(torch.equal(got[name], tensors[name]) and got[name].dtype == tensors[name].dtype for name in tensors)


def test_what_is_got_is_a_copy(folder):
    fill(folder, [0])
    with Store(folder) as opened:
        opened.get(key(0))["mean"].zero_()
        assert same(opened.get(key(0)), 0)


def test_entries_of_two_shapes_do_not_stack(folder):
    with Store(folder) as opened:
        opened.put(key(0), entry(0))
        opened.put(key(1), entry(1, side=4))
        with pytest.raises(ValueError, match="in one entry and"):
            opened.stack([key(0), key(1)])


def test_shards_are_written_as_they_fill_and_as_time_goes_by(folder, monkeypatch):
    monkeypatch.setattr(store, "_SHARD_BYTES", 3 * 2 * 4 * 8 * 8 * 4)
    with Store(folder) as opened:
        for number in range(7):
            opened.put(key(number), entry(number))
        assert len(shards_of(folder)) == 2
        monkeypatch.setattr(store, "_SHARD_SECONDS", 0.0)
        opened.put(key(7), entry(7))
        assert len(shards_of(folder)) == 3
    assert whole(folder, range(8)) == set(range(8))


@pytest.mark.parametrize("where", ["entry", "header", "end", "all", "longer"])
def test_damage_costs_its_own_entries_is_said_and_mended(folder, where, capfd):
    fill(folder, range(12), shards=3)
    victim = shards_of(folder)[1]
    content = bytearray(victim.read_bytes())
    inside = {int(name, 16) for name in shard.Shard(victim).entries}
    if where == "entry":
        content[-1] ^= 1
    elif where == "header":
        content[20] ^= 1
    elif where == "end":
        del content[-10:]
    elif where == "all":
        content.clear()
    else:
        content += b"more"
    victim.write_bytes(content)
    lost = {"entry": 1, "header": 4, "end": 1, "all": 4, "longer": 0}[where]
    with Store(folder, writable=False) as opened:
        assert len(opened.verify()) == max(1, lost if where in ("entry", "end") else 1)
    good = whole(folder, range(12))
    assert len(good) == 12 - lost
    assert set(range(12)) - good <= inside
    capfd.readouterr()
    with Store(folder) as opened:
        for number in range(12):
            if not opened.holds(key(number)):
                opened.put(key(number), entry(number))
    if lost:
        assert victim.name in capfd.readouterr().err
        assert not victim.exists(), "what was whole in it has moved to a new shard"
        with Store(folder) as opened:
            assert not opened.verify()
    assert whole(folder, range(12)) == set(range(12))


def test_a_missing_shard_is_said_and_costs_its_own_entries(folder, capfd):
    fill(folder, range(12), shards=3)
    victim = shards_of(folder)[1]
    victim.unlink()
    with Store(folder, writable=False) as opened:
        assert opened.verify() == [f"{victim.name}: missing, with its 4 entries"]
    capfd.readouterr()
    with Store(folder) as opened:
        assert f"{victim}: missing; its 4 entries are encoded again" in capfd.readouterr().err
        assert sum(opened.holds(key(number)) for number in range(12)) == 8
    with Store(folder) as opened:
        assert not opened.verify()


def test_random_damage_is_found_and_never_served(folder):
    """Flips and truncations anywhere in shards; `whole` compares all that is served with what was put."""
    fill(folder, range(20), shards=4)
    files = shards_of(folder)
    contents, chance = [file.read_bytes() for file in files], random.Random(0)
    for _ in range(60):
        victim, content = chance.choice(list(zip(files, contents, strict=True)))
        place = chance.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        victim.write_bytes(damaged if chance.random() < 0.7 else content[:place])
        assert len(whole(folder, range(20))) < 20
        with Store(folder, writable=False) as opened:
            assert opened.verify()
        victim.write_bytes(content)
    assert len(whole(folder, range(20))) == 20


def test_an_entry_damaged_in_use_is_not_served(folder):
    fill(folder, range(3))
    victim = shards_of(folder)[0]
    with Store(folder) as opened:
        opened.stack([key(0)])
        content = bytearray(victim.read_bytes())
        for span in shard.Shard(victim).entries[key(1)].tensors.values():
            content[span.start] ^= 1
        victim.write_bytes(content)
        with pytest.raises(KeyError):
            opened.stack([key(0), key(1)])
        assert opened.holds(key(2))


def test_the_same_entry_in_two_shards_survives_the_loss_of_either(folder):
    fill(folder, [1, 2])
    fill(folder, [2, 3])
    with Store(folder) as opened:
        opened.put(key(2), entry(2))  # a third
    assert len(shards_of(folder)) == 3
    for victim in shards_of(folder):
        content = victim.read_bytes()
        victim.write_bytes(bytes(reversed(content)))
        assert 2 in whole(folder, [2])
        victim.write_bytes(content)


def test_a_newly_opened_store_sees_what_another_adds(folder):
    with Store(folder) as one, Store(folder) as other:
        one.put(key(0), entry(0))
        one.flush()
        assert not other.holds(key(0))
        other.refresh()
        assert same(other.get(key(0)), 0)


def test_a_shard_that_another_process_replaced_is_found_under_its_new_name(folder):
    fill(folder, range(4))
    with Store(folder) as late:
        victim = shards_of(folder)[0]
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(content)
        with Store(folder) as mender:
            gone = [number for number in range(4) if not mender.holds(key(number))]
        assert len(gone) == 1 and not victim.exists()
        assert [number for number in range(4) if not late.holds(key(number))] == gone


def test_a_shard_replaced_after_its_entries_were_checked_is_found_too(folder, monkeypatch):
    monkeypatch.setattr(store, "_OPEN_MAPS", 1)
    fill(folder, range(6), shards=2)
    with Store(folder) as late:
        assert all(late.holds(key(number)) for number in range(6))
        mapped = late._entries[key(5)].shard.path
        (victim,) = (path for path in shards_of(folder) if path != mapped)
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(content)
        with Store(folder) as mender:
            gone = [number for number in range(6) if not mender.holds(key(number))]
        assert len(gone) == 1 and not victim.exists()
        for number in set(range(6)) - set(gone):
            assert torch.equal(late.stack([key(number)])["mean"][0], entry(number)["mean"])
        with pytest.raises(KeyError):
            late.stack([key(gone[0])])


def write_some(folder, first, count, pause):
    torch.set_num_threads(1)
    store._SHARD_SECONDS = 0.01
    with Store(folder) as opened:
        for number in range(first, first + count):
            opened.refresh()
            if not opened.holds(key(number)):
                opened.put(key(number), entry(number))
            time.sleep(pause)


@pytest.fixture(scope="module")
def processes():
    """Forked, since a process that starts anew cannot import this module: the root is not on the path."""
    return multiprocessing.get_context("fork")


def test_two_processes_on_one_folder(folder, processes):
    workers = [processes.Process(target=write_some, args=(folder, first, 60, 0.002)) for first in (0, 30)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert whole(folder, range(90)) == set(range(90))
    with Store(folder, writable=False) as opened:
        assert not opened.verify()


def test_kill_9_at_any_instant_leaves_whole_entries_that_stay(folder, processes):
    chance, before = random.Random(3), set()
    for _ in range(15):
        worker = processes.Process(target=write_some, args=(folder, 0, 400, 0.001))
        worker.start()
        worker.join(chance.uniform(0.05, 0.5))
        worker.kill()
        worker.join()
        if folder.exists():
            after = whole(folder, range(400))
            assert before <= after
            before = after
            with Store(folder, writable=False) as opened:
                assert not opened.verify()
    assert before, "no worker lived long enough to write"


def test_leftovers_of_a_killed_process_are_swept_when_nobody_can_be_writing_them(folder, monkeypatch):
    fill(folder, [0])
    half = folder / "v3" / f".{'0' * 32}.safetensors.partial-01234567"
    half.write_bytes(b"half")
    Store(folder).close()
    assert half.exists(), "another process may be about to rename it"
    monkeypatch.setattr(store, "_LEFTOVER_SECONDS", 0.001)
    time.sleep(0.01)
    Store(folder).close()
    assert not half.exists()


def test_a_disk_that_fills_up_keeps_what_was_stored(small_disk):
    folder = small_disk("300k") / "cache"
    with pytest.raises(UserError, match="the disk is full"), Store(folder) as opened:
        for number in range(1000):
            opened.put(key(number), entry(number))
            opened.flush()
    stored = whole(folder, range(1000))
    assert len(stored) > 30
    with Store(folder, writable=False) as opened:
        assert not opened.verify()


def test_a_read_only_store_can_be_read_and_says_that_it_cannot_be_written(small_disk):
    disk = small_disk("1m")
    fill(disk / "cache", range(3))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match=r"cannot be written .*choose another place"), Store(disk / "cache") as opened:
        assert same(opened.get(key(0)), 0)
        opened.put(key(9), entry(9))
    assert whole(disk / "cache", range(10)) == {0, 1, 2}
    with pytest.raises(UserError, match=r"other: cannot be used as a cache .*choose another cache\.dir"):
        Store(disk / "other")


@pytest.fixture
def forty_shards(folder, monkeypatch):
    """40 shards of 1 MiB; the keys of all entries."""
    monkeypatch.setattr(store, "_SHARD_BYTES", 2**20)
    with Store(folder) as opened:
        for number in range(320):
            opened.put(key(number), entry(number, side=64))
    assert len(shards_of(folder)) == 40
    return [key(number) for number in range(320)]


def test_memory_stays_flat_while_all_is_checked_and_read(folder, forty_shards):
    process, chance = psutil.Process(), random.Random(0)
    with Store(folder) as opened:
        opened.stack(forty_shards[:4])
        before = process.memory_info().rss
        assert all(map(opened.holds, forty_shards))
        assert process.memory_info().rss - before < 6 * 2**20
        for _ in range(500):
            opened.stack([chance.choice(forty_shards) for _ in range(4)])
        assert process.memory_info().rss - before < 6 * 2**20


def test_few_files_are_open_and_none_afterwards(folder, forty_shards, monkeypatch):
    monkeypatch.setattr(store, "_OPEN_MAPS", 8)
    process = psutil.Process()
    before = process.num_fds()
    with Store(folder) as opened:
        for first in range(0, 320, 4):
            opened.stack(forty_shards[first : first + 4])
            assert process.num_fds() - before <= 8
    assert process.num_fds() == before


def test_more_shards_than_a_process_may_open(folder, monkeypatch):
    monkeypatch.setattr(store, "_SHARD_SECONDS", 0.0)
    monkeypatch.setattr("lowvram_db.atomic._sync", lambda path: None)  # as many syncs would take their time
    fill(folder, range(400))
    assert len(shards_of(folder)) == 400
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (350, hard))
    try:
        assert len(whole(folder, range(400))) == 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_foreign_folder_is_refused_and_left_as_it_was(tmp_path):
    for name in ("notes.txt", "CACHEDIR.TAG", "v3/page.html", f"{'a' * 40}.safetensors"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match="is not a cache of lowvram-db, and not empty; give another folder"):
            Store(folder)
        assert [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()] == [name]
        assert (folder / name).read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not a cache"):
        Store(tmp_path / "file")


def test_a_store_of_another_version_stays_beside(tmp_path, monkeypatch):
    old = tmp_path / "first" / f"{'a' * 64}.safetensors"
    old.parent.mkdir()
    old.write_bytes(b"an entry of version 1")
    fill(old.parent, [1])
    assert old.read_bytes() == b"an entry of version 1"
    assert whole(old.parent, [1]) == {1}
    assert str(Store(old.parent, writable=False).report()).endswith(f"not used, of other versions: {old.name}")

    future = tmp_path / "future"
    fill(future, [1])
    before = {path: path.read_bytes() for path in shards_of(future)}
    monkeypatch.setattr("lowvram_db.cache.folder.FORMAT_VERSION", 4)
    assert whole(future, [1]) == set()
    fill(future, [2])
    assert {path: path.read_bytes() for path in before} == before
    assert whole(future, [1, 2]) == {2}


def test_a_lost_tag_is_written_again(folder):
    fill(folder, [0])
    (folder / "CACHEDIR.TAG").write_bytes(b"damage")
    with Store(folder, writable=False) as opened:
        assert opened.verify() == ["CACHEDIR.TAG: damaged or missing"]
    fill(folder, [1])
    with Store(folder, writable=False) as opened:
        assert not opened.verify()
    assert whole(folder, [0, 1]) == {0, 1}


def test_without_writable_nothing_is_made_or_changed(folder):
    with pytest.raises(UserError, match="cache: does not exist"):
        Store(folder, writable=False)
    fill(folder, range(6), shards=2)
    shards_of(folder)[0].write_bytes(b"damage")
    shards_of(folder)[1].unlink()
    (folder / "v3" / "files.jsonl").write_bytes(b"damage")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with Store(folder, writable=False) as opened:
        assert opened.verify()
        assert not opened.holds(key(0))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_report_counts(folder):
    fill(folder, range(4), shards=2)
    with Store(folder) as opened:
        opened.put(key(9), {"text": torch.zeros(3, 3)})
        opened.flush()
        report = opened.report()
    assert (report.photos, report.prompts, report.shards, report.others) == (4, 1, 3, [])
    assert report.size == sum(path.stat().st_size for path in (folder / "v3").iterdir())
    assert str(report).startswith("views of photos: 4\nprompts: 1\nshards: 3\nsize: 0.0 MiB")
