"""lowvram-db plan, as people run it: in a process of its own, where it matters what that process imports."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SD1 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture
def plan(tmp_path):
    """Run `lowvram-db plan` without network: (exit code, stdout, stderr)."""

    def run(*words):
        command = [sys.executable, "-c", "from lowvram_db.cli import main; main()", "plan", *map(str, words)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "nothing"), "COLUMNS": "80"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def toml(make_config, tmp_path):
    path = tmp_path / "ball.toml"
    path.write_text(make_config(precision={"compute": "bf16"}).to_toml(), encoding="utf-8")
    return path


def test_a_plan_in_json_and_at_once_the_second_time(plan, toml, monkeypatch):
    monkeypatch.setenv("PATH", "")  # where nvidia-smi is: with a card torch is asked how much of it is free
    code, out, err = plan(toml, "--vram", "8GiB", "--json")
    assert code == 0, err
    tree = json.loads(out)
    assert tree["fits"] is True and tree["budget_bytes"] == 8 * 2**30
    assert tree["peak_bytes"] == max(phase["peak_bytes"] for phase in tree["phases"])
    assert plan(toml, "--vram", "8GiB", "--json") == (0, out, "")
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # says on stderr what is imported
    imported = {line.rpartition("|")[2].strip() for line in plan(toml, "--vram", "8GiB", "--json")[2].splitlines()}
    assert "lowvram_db.plan.remember" in imported and imported.isdisjoint(["torch", "diffusers", "transformers"])


def test_table_bars_and_ladder_fit_a_terminal(plan, toml):
    code, out, err = plan(toml, "--vram", "8GiB", "--explain")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 120
    assert "…" not in out
    assert "no checkpointing" in out and "chosen" in out and "not needed: slower" in out
    assert "W weights" in out and "budget 8.00 GiB" in out and "with adam8 and no checkpointing" in out


def test_what_does_not_fit_is_3_and_one_line(plan, toml):
    code, _, err = plan(toml, "--vram", "100MiB")
    assert code == 3
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "does not fit 0.10 GiB" in err and "no smaller setting fits either" in err


def test_bad_input_is_2_and_one_line(plan, toml, miniature, tmp_path):
    broken = shutil.copytree(miniature, tmp_path / "model")
    unet = broken / "unet" / "config.json"
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"window_size": 7}))
    other = shutil.copytree(miniature, tmp_path / "other")
    index = other / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    for words, parts in [
        (["--vram", "lots"], ["memory.vram", "'lots' is not a size"]),
        (["--vram=-4GiB"], ["memory.vram", "is not a size"]),
        (["--set", f"model.name={broken}"], ["unet/config.json: unknown field window_size"]),
        (["--set", f"model.name={other}"], ["a FluxPipeline cannot be planned", "StableDiffusionXLPipeline"]),
        (["--set", "model.name=some/model"], ["the hub cannot be reached"]),
    ]:
        code, out, err = plan(toml, *words)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        for part in parts:
            assert part in err


def test_a_folder_without_weights_is_enough(plan, toml, miniature, tmp_path):
    bare = shutil.copytree(miniature, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    code, _, err = plan(toml, "--set", f"model.name={bare}", "--vram", "8GiB")
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "card"),
    [
        ("sd15-4gb", 3.75),
        ("sd15-8gb", 8),
        ("sd15-12gb", 12),
        ("sd15-t4", 14.5),
        ("sd21-12gb", 12),
        ("sdxl-6gb", 5.6),
        ("sdxl-8gb", 7.6),
        ("sdxl-12gb", 11.25),
        ("sdxl-16gb", 16),
        ("sdxl-vpred", 16),
        ("person-sd15-8gb", 8),
        ("person-sdxl-16gb", 16),
        ("lora-6gb", 6),
        ("lora-8gb", 8),
    ],
)
def test_presets_fit_their_cards(plan, preset, card):
    code, out, err = plan(ROOT / "configs" / f"{preset}.toml", "--json")
    assert code == 0, err
    tree = json.loads(out)
    assert tree["fits"] is True and tree["budget_bytes"] <= card * 2**30
    assert any(phase["name"].startswith("class images") for phase in tree["phases"]), "with prior preservation"


@pytest.mark.slow
def test_sd15_fits_4608_mib_and_sdxl_10_6_gib(plan):
    code, out, err = plan(ROOT / "configs" / "sd15-8gb.toml", "--vram", "4608MiB", "--json")
    assert code == 0, err
    assert json.loads(out)["peak_bytes"] - 2**29 <= 3.9 * 2**30
    words = ["--set", "prior.enabled=false", "--set", "train.resolution=1024", "--json"]
    steps = json.loads(plan(ROOT / "configs" / "sdxl-12gb.toml", *words)[1])["phases"]
    steady = next(phase for phase in steps if phase["name"] == "steady step")
    assert steady["peak_bytes"] - steady["components"]["context"] <= 10.6 * 2**30
