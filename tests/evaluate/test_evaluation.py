import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_db.dreambooth import run_dreambooth
from lowvram_db.errors import UserError
from lowvram_db.evaluate import evaluation as room
from lowvram_db.evaluate.backbones import Found
from lowvram_db.evaluate.evaluation import evaluate
from lowvram_db.evaluate.networks import Backbone, _pixels
from lowvram_db.evaluate.pictures import Candidate
from lowvram_db.families.draw import Drawer
from lowvram_db.families.sd import StableDiffusion


class Colours(Backbone):
    """Judges by eight by eight pixels."""

    def embed(self, pictures):
        return torch.nn.functional.normalize(_pixels(pictures, 8, (0.5,) * 3, (0.5,) * 3).flatten(1), dim=1)

    def agreement(self, pictures, prompts):
        return torch.tensor([float("  " not in prompt and "pkblz" not in prompt) for prompt in prompts])


@pytest.fixture(autouse=True)
def judged_by_colours(monkeypatch, tmp_path):
    (tmp_path / "judge").write_text("weights")
    found = Found("colours", [tmp_path / "judge"], lambda device: Colours(), lambda noun, photos: PROMPTS)
    monkeypatch.setattr(room, "find", lambda wanted, is_demo: found)


PROMPTS = ["a {identifier} {class}", "a red {identifier} {class}"]


@pytest.fixture
def finished(make_config):
    """A run with three checkpoints."""

    def make(**sections):
        checkpoints = {"every": 1, "keep": 9}
        settings = {"checkpoint": checkpoints, "train": {"steps": 3, "lr": 1e-3, "hold_out": 1}, **sections}
        return run_dreambooth(make_config(sample={"steps": 1, "prompts": ["a {class}"]}, **settings))

    return make


def steps(result):
    return [one["step"] for one in result["checkpoints"]]


@pytest.mark.parametrize("text_encoder", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_is_judged_once(finished, monkeypatch, text_encoder):
    run = finished(train={"steps": 3, "lr": 1e-3, "hold_out": 1}, text_encoder={"train": text_encoder})
    result = evaluate(run.folder, seeds=2)
    assert [one["path"] for one in result["checkpoints"]] == [f"checkpoints/step-{step:06d}" for step in (1, 2, 3)]
    assert result["recommended"]["path"] == f"checkpoints/step-{result['recommended']['step']:06d}"
    assert (result["compared_with"], result["photos"]) == ("held-out photos", 1)
    assert result["settings"]["prompts"] == ["a pkblz ball", "a red pkblz ball"]
    assert result["base"]["class_diversity"]["mean"] == pytest.approx(1)
    assert result["base"]["prompt"]["mean"] == 1, "no backbone is asked for the identifier"
    subjects = {one["scores"]["subject"]["mean"] for one in result["checkpoints"]}
    assert len(subjects) == 3, "every checkpoint draws with its own weights"
    assert json.loads((run.folder / "evaluation.json").read_text()) == result
    assert len((run.folder / "evaluation.csv").read_text().splitlines()) == 1 + 4 * 5
    assert f"Keep step {result['recommended']['step']}." in run.report.read_text(encoding="utf-8")

    monkeypatch.setattr(Candidate, "pictures", lambda *_: pytest.fail("drawn again"))
    monkeypatch.setattr(Colours, "embed", lambda *_: pytest.fail("looked at again"))
    assert evaluate(run.folder, seeds=2) == result


WAYS = {
    "text encoder": {"text_encoder": {"train": True}},
    "text encoder, frozen since": {"text_encoder": {"train": True, "stop": 1}},
    "average": {"train": {"steps": 2, "lr": 1e-2, "ema": 0.9}},
    "LoRA": {"method": {"name": "lora", "rank": 4}, "text_encoder": {"train": True}, "train": {"steps": 2, "lr": 0.1}},
    "average of a LoRA": {"method": {"name": "lora", "rank": 4}, "train": {"steps": 2, "lr": 0.1, "ema": 0.9}},
}


SLOW = ("text encoder", "average of a LoRA")


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] if way in SLOW else []) for way in WAYS])
def test_the_last_checkpoint_draws_what_the_run_has_made(finished, way):
    run = finished(**{"train": {"steps": 2, "lr": 1e-2}, **WAYS[way]})
    last = evaluate(run.folder, seeds=1)["checkpoints"][-1]
    shutil.rmtree(run.checkpoints)
    result = evaluate(run.folder, seeds=1)
    assert [one["path"] for one in result["checkpoints"]] == ["lora.safetensors" if "LoRA" in way else "model"]
    for name, score in last["scores"].items():
        assert result["checkpoints"][0]["scores"][name]["by_seed"] == pytest.approx(score["by_seed"], abs=1e-5)
    assert last["scores"]["subject"]["mean"] != pytest.approx(result["base"]["subject"]["mean"], abs=1e-3)


def test_of_pissa_the_finished_lora_alone_is_judged(finished, capfd):
    """What it began with is taken off that one, and is in no checkpoint."""
    run = finished(method={"name": "lora", "rank": 4, "init": "pissa"}, train={"steps": 2, "lr": 0.01})
    assert [one["path"] for one in evaluate(run.folder, seeds=1)["checkpoints"]] == ["lora.safetensors"]
    assert capfd.readouterr().err.count("by PiSSA is not in it, only taken off the finished one; left out") == 2


def test_a_checkpoint_of_another_model_is_left_out(finished, make_config, tmp_path, miniature, capfd):
    other = tmp_path / "other"
    shutil.copytree(miniature, other)
    run = finished(model={"name": str(other)}, train={"steps": 1})
    weights = next((other / "unet").glob("*.safetensors"))
    save_file({name: 1.1 * tensor for name, tensor in load_file(weights).items()}, weights)
    assert steps(evaluate(run.folder, seeds=1)) == [1]
    assert f"was trained from another model than {other}; left out" in capfd.readouterr().err


def test_a_new_checkpoint_and_another_judge_draw_only_what_is_new(finished, make_config, monkeypatch, tmp_path):
    run = finished(train={"steps": 2, "lr": 1e-3, "hold_out": 1})
    evaluate(run.folder, seeds=1)
    count = len(list((run.folder / "evaluation").iterdir()))
    assert count == 3 * (2 + 6)
    finished()
    drawn, draw = [], Drawer.draw
    monkeypatch.setattr(
        Drawer, "draw", lambda self, told, seeds, **how: drawn.extend(seeds) or draw(self, told, seeds, **how)
    )
    assert steps(evaluate(run.folder, seeds=1)) == [1, 2, 3]
    assert len(drawn) == 2 + 6
    (tmp_path / "judge").write_text("other weights")
    before = (run.folder / "evaluation.json").stat().st_mtime_ns
    evaluate(run.folder, seeds=1)
    assert len(drawn) == 2 + 6
    assert (run.folder / "evaluation.json").stat().st_mtime_ns > before


def test_the_judge_comes_when_no_denoiser_is_left(finished, monkeypatch):
    alive, load_denoiser = [], StableDiffusion.load_denoiser

    def watched(family, *how):
        network = load_denoiser(family, *how)
        alive.append(weakref.ref(network))
        return network

    run = finished(train={"steps": 1, "hold_out": 1})
    monkeypatch.setattr(StableDiffusion, "load_denoiser", watched)

    def load(device):
        assert len(alive) == 2 and not any(network() for network in alive)
        return Colours()

    found = Found("colours", [], load, lambda noun, photos: PROMPTS)
    monkeypatch.setattr(room, "find", lambda wanted, is_demo: found)
    evaluate(run.folder, seeds=1)
    assert len(alive) == 2


def test_models_that_do_not_fit_draw_the_same_by_weights_from_ram(finished, monkeypatch, delayed, capfd):
    delayed(0)
    load_denoiser = StableDiffusion.load_denoiser

    def large(family, *how):
        network = load_denoiser(family, *how)

        def fits(*_):
            if not any(getattr(layer, "lender", None) for layer in network.modules()):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        network.register_forward_pre_hook(fits)
        return network

    run = finished(train={"steps": 1, "hold_out": 1})
    wanted = evaluate(run.folder, seeds=1)
    shutil.rmtree(run.folder / "evaluation")
    (run.folder / "evaluation.json").unlink()
    monkeypatch.setattr(StableDiffusion, "load_denoiser", large)
    assert evaluate(run.folder, seeds=1) == wanted
    assert capfd.readouterr().err.count("the denoiser's weights pass through from RAM from here on") == 2


def test_what_is_damaged_or_of_another_kind_is_said_and_left_out(finished, capfd):
    run = finished()
    one, two, three = (run.checkpoint(step) for step in (1, 2, 3))
    state = json.loads((one / "state.json").read_text())
    (one / "state.json").write_text(json.dumps({**state, "format": 1}))
    weights = load_file(three / "unet.safetensors")
    (two / "unet.safetensors").write_bytes((two / "unet.safetensors").read_bytes()[:1000])
    (run.checkpoints / "step-000009").mkdir()
    (run.checkpoints / "step-000009" / "state.json").write_text('{"st')
    assert steps(evaluate(run.folder, seeds=1)) == [3]
    said = capfd.readouterr().err
    for name in (one, two, run.checkpoints / "step-000009"):
        assert f"{name}: " in said
    assert said.count("left out") == 3
    save_file({"lora.weight": weights["conv_in.weight"]}, three / "unet.safetensors")
    shutil.rmtree(run.model)
    with pytest.raises(UserError, match="neither a whole checkpoint nor a model to"):
        evaluate(run.folder, seeds=1)


def test_photos_that_moved_are_named_and_can_be_said(finished, tmp_path, photos, capfd):
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    run = finished(subject={"photos": str(moved), "identifier": "pkblz", "class": "ball"})
    shutil.rmtree(moved)
    with pytest.raises(UserError, match=r"subject\.photos: .*moved is not there.* --set subject\.photos=FOLDER"):
        evaluate(run.folder, seeds=1)
    found = evaluate(run.folder, seeds=1, overrides=[f"subject.photos={json.dumps(str(photos))}"])
    assert "not the photos" not in capfd.readouterr().err
    assert steps(found) == [1, 2, 3]
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    next(other.iterdir()).unlink()
    evaluate(run.folder, seeds=1, overrides=[f"subject.photos={json.dumps(str(other))}"])
    assert "these are not the photos that checkpoints/step-000003 was trained on" in capfd.readouterr().err


def test_a_folder_that_cannot_be_written_costs_the_files_alone(finished, monkeypatch, capfd):
    run = finished(train={"steps": 1})
    (run.folder / "evaluation").write_text("in the way")
    (run.folder / "evaluation.json").mkdir()
    assert steps(evaluate(run.folder, seeds=1)) == [1]
    said = capfd.readouterr().err
    assert "its pictures are not kept" in said and "not all of the evaluation is written" in said


def test_a_checkpoint_that_draws_nothing_is_left_out_and_a_base_model_that_does_ends_it(finished, monkeypatch, capfd):
    run, draw = finished(train={"steps": 2}), Candidate.pictures

    def drawing(broken):
        def pictures(model, *how):
            if model.step in broken:
                raise UserError("the model's pictures are no numbers (NaN)")
            draw(model, *how)

        monkeypatch.setattr(Candidate, "pictures", pictures)
        return steps(evaluate(run.folder, seeds=1))

    for broken, said in (([0], "^the model's pictures are no numbers"), ([1, 2], "no checkpoint of it draws pictures")):
        with pytest.raises(UserError, match=said):
            drawing(broken)
    assert drawing([1]) == [2]
    assert "checkpoints/step-000001: the model's pictures are no numbers (NaN); left out" in capfd.readouterr().err


def test_a_disk_that_fills_up_ends_it_and_what_was_drawn_is_kept(finished, small_disk):
    """In the middle of a checkpoint's pictures, which are left out of no judgement."""
    run = finished(train={"steps": 2})
    (run.folder / "evaluation").symlink_to(small_disk("200k"))
    with pytest.raises(UserError, match=r"evaluation/.*: the disk is full \(0\.00 GiB free\); free some space and run"):
        evaluate(run.folder, seeds=1)
    assert not (run.folder / "evaluation.json").exists()
    kept = shutil.copytree(run.folder / "evaluation", run.folder / "kept")
    (run.folder / "evaluation").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in kept.rename(run.folder / "evaluation").iterdir()}
    assert steps(evaluate(run.folder, seeds=1)) == [1, 2]
    assert 8 <= len(times) < 24 == len(list((run.folder / "evaluation").iterdir()))
    assert times.items() <= {(path.name, path.stat().st_mtime_ns) for path in (run.folder / "evaluation").iterdir()}


def test_the_command_line_prints_a_table_or_json(finished, lowvram_db, tmp_path):
    run = finished(train={"steps": 1})
    code, out, _ = lowvram_db("evaluate", run.folder, "--seeds", 2)
    assert code == 0 and "recommended: checkpoints/step-000001: of 1 step kept" in out
    code, out, _ = lowvram_db("evaluate", run.folder, "--seeds", 2, "--json")
    assert code == 0 and json.loads(out)["backbone"] == "colours"
    (tmp_path / "p.txt").write_text("a {identifier} {class} on Mars")
    code, out, _ = lowvram_db("evaluate", run.folder, "--seeds", 1, "--prompts", tmp_path / "p.txt", "--json")
    assert json.loads(out)["settings"]["prompts"] == ["a pkblz ball on Mars"]
    for words in (["none"], [run.folder, "--seeds", 17], [run.folder, "--prompts", "none.txt"]):
        code, _, said = lowvram_db("evaluate", *words)
        assert code == 2 and len(said.strip().splitlines()) == 1
