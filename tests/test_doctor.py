import json
import sys

import pytest
import torch

from lowvram_db import cli, doctor


def by_name(folder):
    return {line.name: line for line in doctor.examine(folder)}


def test_this_machine_can_train(tmp_path):
    lines = by_name(tmp_path)
    assert doctor.possible(list(lines.values()))
    assert lines["Python"].state == lines["torch"].state == lines["attention"].state == "ok"
    assert lines["bitsandbytes"].detail.endswith("stepped on cpu") or torch.cuda.is_available()
    assert all(line.detail for line in lines.values())


@pytest.mark.parametrize("release", ["6.1.0-49-amd64", "5.15.153.1-microsoft-standard-WSL2"])
def test_wsls_half_of_the_memory_is_told_with_the_way_to_more(monkeypatch, release):
    monkeypatch.setattr("platform.release", lambda: release)
    line = doctor._ram()
    assert line.state == "ok" and "free of" in line.detail
    assert ("WSL takes half" in line.detail) == (".wslconfig" in line.mend) == ("WSL2" in release)


def test_what_is_broken_is_named_with_its_mend_and_stops_nothing(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("undefined symbol: cadam8bit\nand more")

    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit", broken)
    line = by_name(tmp_path)["bitsandbytes"]
    assert (line.state, line.detail) == ("broken", "RuntimeError: undefined symbol: cadam8bit")
    assert line.mend == "pip install --force-reinstall bitsandbytes"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's adam8 is Triton's")
@pytest.mark.parametrize("works", [True, False])
def test_a_cpu_without_a_compiler_is_told_what_it_costs_and_the_mend(monkeypatch, works):
    monkeypatch.setattr("lowvram_db.kernels.native.works", lambda: works)
    line = doctor._native()
    assert (line.state, bool(line.mend)) == (("ok", False) if works else ("absent", True))
    assert ("ten times as long" in line.detail) != works


def test_an_optimizer_that_does_nothing_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.step", lambda self: None)
    assert by_name(tmp_path)["bitsandbytes"].detail.endswith("a step did nothing")


def test_attention_that_computes_nonsense_makes_training_impossible(tmp_path, monkeypatch):
    monkeypatch.setattr("lowvram_db.memory.attention.preflight", lambda *_: "gives wrong results on cpu")
    lines = by_name(tmp_path)
    assert lines["attention"].mend == 'set attention = "xformers"'
    assert not doctor.possible(list(lines.values()))


@pytest.mark.parametrize(
    ("visible", "release", "cuda", "parts"),
    [
        ("0", "580.95.05", None, ["driver (580.95.05), but this torch has no CUDA", "pip install torch==X"]),
        ("0", "470.256.02", "13.0", ["driver (470.256.02) is too old for CUDA 13.0", "pip install torch==X"]),
        ("0", "", "13.0", ["its driver is missing", "pip install torch==X"]),
        ("", "580.95.05", "13.0", ["CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES"]),
    ],
)
def test_a_gpu_that_torch_cannot_use_says_why(tmp_path, monkeypatch, visible, release, cuda, parts):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("lowvram_db.memory.driver.version", lambda: release)
    monkeypatch.setattr("lowvram_db.memory.driver.mend", lambda: "pip install torch==X")
    line = by_name(tmp_path)["GPU"]
    assert parts[0] in line.detail and line.mend == parts[1]


def test_triton_that_cannot_compile_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr("lowvram_db.kernels.launch.problem", lambda device: "CalledProcessError: gcc")
    monkeypatch.setattr("lowvram_db.kernels.launch.mend", lambda: "apt install gcc")
    line = by_name(tmp_path)["Triton"]
    assert line.state == "broken" and "CalledProcessError: gcc" in line.detail and line.mend == "apt install gcc"


@pytest.mark.parametrize("broken", [False, True])
def test_json_and_exit_code(monkeypatch, capfd, broken):
    if broken:
        monkeypatch.setattr("lowvram_db.memory.attention.preflight", lambda *_: "gives wrong results on cpu")
    monkeypatch.setattr(sys, "argv", ["lowvram-db", "doctor", "--json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    tree = json.loads(capfd.readouterr().out)
    assert tree["training_possible"] is not broken
    assert (stopped.value.code or 0) == (2 if broken else 0)
    assert {line["name"] for line in tree["checks"]} >= {"Python", "torch", "GPU", "Triton", "xFormers", "disk"}
