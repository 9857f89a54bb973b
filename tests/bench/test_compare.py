"""What bench/compare.py makes of bad input, and of peers that are missing or fail. Speed is not tested."""

import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
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
def run_peer(compare, tmp_path):
    """Run a script as if it were diffusers' trainer."""
    work, path = compare.Work("lowvram_db/demo/base", 64, compute="fp32"), tmp_path / "train_dreambooth.py"

    def run(text):
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
