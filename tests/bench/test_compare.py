"""What bench/compare.py makes of bad input, and of peers that are missing or fail. Speed is not tested."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
BASE = str(BENCH.parent / "lowvram_db" / "demo" / "base")
TRAINER = """
import torch, time
weight = torch.nn.Parameter(torch.ones(4))
optimizer = torch.optim.SGD([weight], lr=1.0)
for step in range(4):
    time.sleep(0.25)
    weight.sum().backward()
    optimizer.step()
"""


@pytest.fixture
def compare(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCH))
    import compare

    yield compare
    for name in set(sys.modules) - before:
        if (BENCH / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def peers(compare):
    return sys.modules["peers"]


@pytest.fixture
def run_peer(compare, tmp_path):
    """Run a script as if it were diffusers' trainer."""
    path = tmp_path / "train_dreambooth.py"

    def run(text, compute="fp32"):
        work = compare.Work("lowvram_db/demo/base", 64, compute=compute)
        path.write_text(text)
        return compare.run_peer("diffusers", path, "lowvram_db/demo/base", work, "cpu", 3, None)

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be had")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cuda"], "error: --device cuda: no GPU answers here"),
        (["--vram", "8"], "error: --vram: caps a GPU's allocator, and this runs on a CPU"),
        (["--peer", "nobody"], "error: --peer nobody: give KIND=SCRIPT"),
        (["--recipes", "classci"], "error: --recipes: no 'classci'; there are ours, ours-residual, classic"),
        (
            ["--checkpointed", "10"],
            "error: --checkpointed 10: stable-diffusion-v1-5/stable-diffusion-v1-5 has 9 blocks",
        ),
        (["--checkpointed", "all"], "error: --checkpointed all: numbers of blocks are wanted"),
        (["--model", "nowhere/at all"], "error: model.name: "),
    ],
)
def test_what_cannot_be_measured_is_refused(compare, monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    with pytest.raises(SystemExit) as stop:
        compare.main()
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_peers_steps_are_timed_by_its_optimizer(run_peer):
    result = run_peer(TRAINER)
    assert result["outcome"] == "ok" and result["step_s"] >= 0.25 and result["process_gib"] > 0.05
    assert result["made_with"]["torch"] == torch.__version__ and "diffusers " in result["made_with"]["versions"]


@pytest.mark.slow
def test_a_peer_runs_by_the_python_of_its_own_checkout(run_peer, tmp_path):
    """Which here is a shell script: it says that it was called, and calls the one that runs the test."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ntouch "{tmp_path}/called"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    assert run_peer(TRAINER)["outcome"] == "ok" and (tmp_path / "called").exists()


def test_a_checkout_is_named_by_its_commit_and_searched_up_to_its_root(peers, tmp_path, monkeypatch):
    script = tmp_path / "checkout" / "examples" / "train.py"
    script.parent.mkdir(parents=True)
    script.write_text("")
    git = ["git", "-C", str(tmp_path / "checkout"), "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").write_text("of somebody else")
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr(peers, "ROOT", tmp_path / "checkout")
    assert peers.commit_of(script) == "", "ours, in which a peer's script may lie, tells nothing of it"
    monkeypatch.undo()
    assert len(peers.commit_of(script)) >= 7 and head.startswith(peers.commit_of(script))
    assert peers.python_of(script) == sys.executable
    own = tmp_path / "checkout" / ".venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.write_text("")
    assert peers.python_of(script) == str(own)


def test_a_peer_imports_its_own_modules_also_where_ours_have_the_same_name(run_peer, tmp_path):
    (tmp_path / "machine.py").write_text("MINE = True")
    assert run_peer(f"import machine\nassert machine.MINE\n{TRAINER}")["outcome"] == "ok"


@pytest.mark.parametrize("native", [True, False])
def test_peers_go_without_mixed_precision_where_it_would_be_emulated(
    run_peer, peers, monkeypatch, halves_are_native, native
):
    halves_are_native(native)
    commands = []

    def noted(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "not run")

    monkeypatch.setattr(peers.subprocess, "run", noted)
    run_peer(TRAINER, compute="bf16")
    (words,) = commands
    assert words[words.index("--mixed_precision") + 1] == ("bf16" if native else "no")


@pytest.mark.parametrize("recipe", ["Ours", "Classic"])
def test_recipes_compute_in_float32_where_half_precision_would_be_emulated(compare, halves_are_native, recipe):
    """Seen at the doors of the UNet; ours stores its weights as ever."""
    halves_are_native(False)
    made = getattr(compare, recipe)(compare.Work(BASE, 64, compute="bf16"), torch.device("cpu"))
    unet = made.learner.denoiser if recipe == "Ours" else made._unet
    seen = set()
    for layer in (unet.conv_in, unet.conv_out):
        layer.register_forward_hook(lambda _, inputs, output: seen.update([inputs[0].dtype, output.dtype]))
    made.step()
    assert seen == {torch.float32}
    assert unet.conv_in.weight.dtype == (torch.bfloat16 if recipe == "Ours" else torch.float32)


@pytest.mark.parametrize(("native", "said"), [(True, "bf16"), (False, "fp32 for bf16")])
def test_a_row_says_what_was_computed_in(compare, monkeypatch, halves_are_native, native, said):
    halves_are_native(native)
    rows = []
    monkeypatch.setattr(compare, "add_row", lambda name, row: rows.append(row))
    compare._report(compare.Work(BASE, 64), "cpu", None, 1, {"recipe": "ours", "outcome": "out of memory"})
    assert rows[0]["compute"] == said


@pytest.mark.slow
def test_a_peer_that_stops_early_is_no_measurement(run_peer):
    assert run_peer(TRAINER.replace("range(4)", "range(3)"))["outcome"].startswith("failed (0): ")


def test_a_peer_that_is_not_there_is_a_result(compare, tmp_path):
    work = compare.Work("lowvram_db/demo/base", 64)
    missing = compare.run_peer("diffusers", tmp_path / "none.py", "lowvram_db/demo/base", work, "cpu", 1, None)
    assert missing["outcome"] == f"failed: there is no {tmp_path / 'none.py'}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        ("RuntimeError('wants another diffusers')", "failed (1): RuntimeError: wants another diffusers"),
        ("torch.OutOfMemoryError('CUDA out of memory.')", "out of memory"),
    ],
)
def test_a_peer_that_fails_is_a_result(run_peer, error, outcome):
    assert run_peer(f"import torch\nraise {error}")["outcome"] == outcome
