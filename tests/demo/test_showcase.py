import sys

import numpy as np
import pytest
from PIL import Image

from lowvram_db.demo import __main__ as command
from lowvram_db.demo.showcase import ELSEWHERE, SEEDS, before_after
from lowvram_db.dreambooth import run_dreambooth


def test_base_and_both_runs_stand_side_by_side(make_config):
    """Same noise in every column of a seed: where a run changed nothing much, its picture is the base's."""
    small = {"sample": {"steps": 2, "seeds": 1}, "train": {"resolution": 64, "steps": 1, "lr": 1e-8}}
    kept = run_dreambooth(make_config(output={"name": "kept"}, **small))
    lost = run_dreambooth(make_config(output={"name": "lost"}, prior={"enabled": False}, **small))
    sheet = np.asarray(Image.open(before_after(kept, lost)))
    side, gap = 128, 4
    columns, rows = 3 * SEEDS, len(ELSEWHERE) + 2
    assert sheet.shape[1] == 120 + columns * (side + gap)
    top = sheet.shape[0] - rows * (side + gap)
    cells = [
        sheet[top : top + side, 120 + column * (side + gap) : 120 + column * (side + gap) + side].astype(int)
        for column in range(columns)
    ]
    for seed in range(SEEDS):
        base, with_prior, without = cells[seed::SEEDS]
        assert np.abs(base - with_prior).mean() < 2
        assert np.abs(base - without).mean() < 2
    assert np.abs(cells[0] - cells[1]).mean() > 5


def test_a_run_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python -m lowvram_db.demo", str(tmp_path / "one"), str(tmp_path / "two")])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    assert str(tmp_path / "one") in capsys.readouterr().err
