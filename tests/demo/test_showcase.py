import sys

import numpy as np
import pytest
from PIL import Image

from lowvram_db.demo import __main__ as command
from lowvram_db.demo.showcase import SEEDS, before_after
from lowvram_db.errors import UserError
from lowvram_db.run import Run
from lowvram_db.sheet import Grid, save_sheet

SIDE, GAP, PROMPTS = 64, 4, ["a photo", "another"]


def grid(shade: int, seeds: int = 3) -> Grid:
    """A model's pictures, each of one grey: the shade, and one more for each prompt and seed."""
    greys = [[shade + 10 * row + seed for seed in range(seeds)] for row in range(len(PROMPTS))]
    return Grid(
        PROMPTS, [2.5], seeds, 5, [[Image.new("RGB", (SIDE, SIDE), (grey,) * 3) for grey in row] for row in greys]
    )


@pytest.fixture
def finished(make_config):
    """A run whose pictures are drawn, with the base model's above."""

    def make(name: str, shade: int, **sections: object) -> Run:
        config = make_config(output={"name": name}, **sections)
        run = Run.of(config)
        run.save_config(config)
        run.sample_grid(0).parent.mkdir(parents=True)
        save_sheet(run.sample_grid(0), {"base": grid(100)})
        save_sheet(run.sample_grid(config.train.steps), {"base": grid(100), "step": grid(shade)})
        return run

    return make


def test_base_and_both_runs_stand_side_by_side(finished):
    kept, lost = finished("kept", 150), finished("lost", 200, prior={"enabled": False})
    sheet = np.asarray(Image.open(before_after(kept, lost)))
    left, top = 120, sheet.shape[0] - len(PROMPTS) * (2 * SIDE + GAP)
    middles = sheet[top + SIDE :: 2 * SIDE + GAP, left + SIDE :: 2 * SIDE + GAP, 0]
    columns = [shade + seed for shade in (100, 150, 200) for seed in range(SEEDS)]
    assert middles.tolist() == [columns, [grey + 10 for grey in columns]]


def test_pictures_of_other_prompts_or_seeds_are_not_compared(finished):
    kept, lost = finished("kept", 150), finished("lost", 200)
    save_sheet(lost.sample_grid(last_step(lost)), {"step": grid(200, seeds=2)})
    with pytest.raises(UserError, match="different prompts"):
        before_after(kept, lost)


def last_step(run: Run) -> int:
    return max(int(path.stem.removeprefix("step-")) for path in run.sample_grid(0).parent.glob("step-*.png"))


def test_a_run_without_pictures_is_named(finished):
    kept, lost = finished("kept", 150), finished("lost", 200)
    lost.sample_grid(last_step(lost)).unlink()
    with pytest.raises(UserError, match=r"lost.*has no such pictures"):
        before_after(kept, lost)


def test_a_run_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python -m lowvram_db.demo", str(tmp_path / "one"), str(tmp_path / "two")])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    assert str(tmp_path / "one") in capsys.readouterr().err
