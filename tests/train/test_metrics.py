import json
import shutil

import pytest

from lowvram_db.train.metrics import Metrics


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_steps_that_are_done_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, tmp_path / "tensorboard", done=0) as metrics:
        for step in range(1, 6):
            metrics.log(step, loss=1.0 / step)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    with Metrics(path, tmp_path / "tensorboard", done=3) as metrics:
        assert steps(path) == [1, 2, 3]
        metrics.log(4, loss=0.5)
    assert steps(path) == [1, 2, 3, 4]


def test_a_line_is_on_disk_when_it_is_logged(tmp_path):
    with Metrics(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", done=0) as metrics:
        metrics.log(1, loss=2.5, lr=1e-6)
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.5, "lr": 1e-6}


@pytest.mark.parametrize("damage", [b"", b"\0" * 4096, b"[1]\n7\nnull\n{}\n", b"\xff\xfe\n", b'{"step": "one"}\n'])
def test_what_a_power_cut_leaves_is_dropped(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage)
    with Metrics(path, tmp_path / "tensorboard", done=1) as metrics:
        metrics.log(2, loss=1.0)
    assert steps(path) == [1, 2]


@pytest.mark.parametrize("place", ["metrics.jsonl", "tensorboard"])
def test_a_log_that_cannot_be_written_is_said_once_and_left_out(tmp_path, capfd, place):
    (tmp_path / place).mkdir() if place == "metrics.jsonl" else (tmp_path / place).write_text("in the way")
    with Metrics(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", done=0) as metrics:
        for step in range(1, 4):
            metrics.log(step, loss=1.0)
    assert capfd.readouterr().err.count(f"{place}: not written") == 1
    if place == "tensorboard":
        assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_a_disk_that_fills_up_ends_no_training(tmp_path, capfd, small_disk):
    disk = small_disk("256k")
    with Metrics(disk / "metrics.jsonl", tmp_path / "tensorboard", done=0) as metrics:
        (disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(disk).free - 4096))
        for step in range(1, 400):
            metrics.log(step, loss=1.0)
    assert capfd.readouterr().err.count("not written any more") == 1
