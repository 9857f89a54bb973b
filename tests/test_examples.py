"""The worked examples of docs/examples, each from its own TOML and with its own commands, on a miniature."""

import json
import re
import shutil
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SMALL = ["train.steps=2", "train.resolution=64", "prior.count=2", "prior.steps=1", "sample.steps=1", "sample.seeds=1",
         "sample.guidance=[2.0]", "checkpoint.every=1", 'precision.compute="fp32"']  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param("pokeball", marks=pytest.mark.slow), "jellyfish"])
def test_an_example_runs_from_its_config_to_its_file(name, lowvram_db, tmp_path, miniature, photos, monkeypatch):
    commands = re.findall(r"^    lowvram-db (.*)$", (EXAMPLES / f"{name}.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["plan", "train", "evaluate", "export"]
    shutil.copytree(EXAMPLES, tmp_path / "docs" / "examples")
    shutil.copytree(photos, tmp_path / "photos" / name)
    monkeypatch.setattr("lowvram_db.evaluate.evaluation.find", _colours)
    for command in commands:
        words = command.split()
        changed = {"plan": [], "train": [*SMALL, f"model.name={json.dumps(str(miniature))}"]}.get(words[0], [])
        extra = [word for change in changed for word in ("--set", change)]
        code, out, err = lowvram_db(*words, *extra, *(["--seeds", "1"] if words[0] == "evaluate" else []))
        assert code == 0, (command, out, err)
    assert (tmp_path / f"{name}.safetensors").is_file()


def _colours(wanted, is_demo):
    """No real judge is on a machine that tests."""
    from lowvram_db.evaluate.backbones import Found
    from lowvram_db.evaluate.networks import DemoCritic

    return Found("critic", [], lambda device: DemoCritic())
