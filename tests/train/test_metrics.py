import json

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
