import sys

from diffusers import StableDiffusionPipeline

from lowvram_db.demo import __main__ as command
from lowvram_db.photos import find_photos


def test_the_demos_model_and_photos_are_written_once(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "miniature"
    monkeypatch.setattr(sys, "argv", ["python -m lowvram_db.demo", str(folder)])
    command.main()
    assert "RANDOM weights" in capsys.readouterr().out
    assert len(find_photos(folder / "photos", "subject.photos")) == 5
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model")
    assert pipeline("a ball", num_inference_steps=1).images[0].size == (64, 64)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    command.main()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
