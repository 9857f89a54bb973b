"""Where kernels run, and what happens where Triton is missing or broken."""

import contextlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from lowvram_db.kernels import adafactor, adam8, launch, noise_loss

HEADERS = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _ask_again():
    launch.problem.cache_clear()
    yield
    launch.problem.cache_clear()


def test_a_cpu_takes_what_is_native_unless_another_is_asked_for():
    assert launch.implementation("auto", CPU) == "native"
    assert launch.implementation("torch", CPU) == "torch"
    if launch.interpreted():
        assert launch.implementation("triton", CPU) == "triton"
    assert launch.implementation("native", CPU) == "native", "a choice made before stays"


def test_cpu_tensors_take_the_twin_unless_triton_is_asked_for():
    assert not launch.runs_triton("auto", CPU)
    assert not launch.runs_triton("torch", CPU)
    if launch.interpreted():
        assert launch.runs_triton("triton", CPU)


def test_triton_on_a_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="Triton does not run here: it has no compiler for cpu"):
        launch.runs_triton("triton", CPU)


def test_a_missing_triton_is_said_once_and_the_twins_are_used(monkeypatch):
    monkeypatch.setattr(launch, "triton", None)
    with pytest.warns(UserWarning, match=r"Triton does not run here \(it is not installed\); PyTorch's own operations"):
        assert not launch.runs_triton("auto", GPU)
    assert not launch.runs_triton("torch", GPU)
    with pytest.raises(RuntimeError, match="it is not installed"):
        launch.runs_triton("triton", GPU)


@pytest.mark.parametrize("failure", [RuntimeError("no C compiler\nlong story"), OSError("cache folder not writable")])
def test_a_broken_triton_is_found_by_running_a_kernel(monkeypatch, failure):
    class Broken:
        def __getitem__(self, grid):
            raise failure

    monkeypatch.setattr(launch, "_add_one", Broken())
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.empty(*shape))
    with pytest.warns(UserWarning, match=rf"\({type(failure).__name__}: {str(failure).splitlines()[0]}\)"):
        assert not launch.runs_triton("auto", GPU)


def test_a_kernel_that_computes_nonsense_is_not_used(monkeypatch):
    class Nothing:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: None

    monkeypatch.setattr(launch, "_add_one", Nothing())
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    with pytest.warns(UserWarning, match="computed nonsense"):
        assert not launch.runs_triton("auto", GPU)


def test_kernels_can_be_imported_and_used_without_triton(tmp_path):
    """As on Windows: the optimizer steps, the loss is computed."""
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')\n")
    program = """
import torch
from lowvram_db.kernels import noise_loss
from lowvram_db.optim.adam8 import Adam8
parameter = torch.nn.Parameter(torch.ones(64, 128))
optimizer = Adam8([parameter], lr=0.1, weights="fp32", weight_decay=0.0)
parameter.grad = torch.ones_like(parameter)
optimizer.step()
print(round(parameter.mean().item(), 2))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "0.9\n", done.stderr


@pytest.mark.parametrize("name", ["adam8", "adafactor", "noisy", "loss"])
def test_a_kernel_is_launched_on_its_tensors_card(monkeypatch, name):
    """Triton takes the current one."""
    current, launched = [None], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **_: launched.append((current[-1], [a for a in arguments if torch.is_tensor(a)]))

    @contextlib.contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module, kernel in (
        (adam8, "_kernel"),
        (adafactor, "_kernel"),
        (noise_loss, "_noisy_kernel"),
        (noise_loss, "_loss_kernel"),
    ):
        monkeypatch.setattr(module, kernel, Kernel())
    flat, noise, ones = torch.ones(256), torch.ones(1, 4, 8, 8), torch.ones(1)
    record = torch.zeros(4, dtype=torch.int64)
    noised = noise, noise, torch.zeros(1, dtype=torch.int64), torch.ones(1, 5), torch.zeros(2, dtype=torch.int64)
    if name == "adam8":
        adam8.update_(flat, None, flat, flat, ones, ones, ones, record, 0, "triton")
    elif name == "adafactor":
        matrix, numbers = flat.view(1, 256), torch.ones(3)
        adafactor.update_(matrix, None, matrix, ones, flat, ones, numbers, record, 0, "triton")
    elif name == "noisy":
        noise_loss.noisy_latents(*noised, True)
    else:
        noise_loss.noise_loss(noise, *noised, ones, None, True)
    ((guard, tensors),) = launched
    assert guard is not None and guard.data_ptr() in {tensor.data_ptr() for tensor in tensors}
    assert current == [None]


class OnCard(torch.Tensor):
    """A tensor that says it lies on the second card."""

    device = torch.device("cuda", 1)
    is_cuda = True


class Compiling:
    """A kernel that notes what it is called with, and so does what it compiles."""

    def __init__(self):
        self.compiled, self.run = [], []

    def __getitem__(self, grid):
        def call(*arguments, **constants):
            self.compiled.append((grid, arguments, constants))
            return {(*grid, 1, 1)[:3]: lambda *words: self.run.append(words)}

        return call


@pytest.fixture
def on_second_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(launch, "_RUNNERS", {})
    return lambda *shape, dtype=torch.float32: torch.zeros(*shape, dtype=dtype).as_subclass(OnCard)


def test_a_kernel_is_looked_up_once(on_second_card):
    kernel, x, other = Compiling(), on_second_card(8), on_second_card(8)
    for tensor in (x, other, x):
        launch.launch(kernel, (3,), tensor, None, 5, maxnreg=80, MODE="bf16")
    ((grid, arguments, constants),) = kernel.compiled
    assert grid == (3,) and arguments[0] is x and arguments[1:] == (None, 5)
    assert constants == {"MODE": "bf16", "maxnreg": 80}
    assert [words[0] is tensor for words, tensor in zip(kernel.run, (other, x), strict=True)] == [True, True]
    assert [words[1:] for words in kernel.run] == [(None, 5, "bf16")] * 2


def test_what_triton_compiles_for_is_another_kernel(on_second_card, monkeypatch):
    """Also one that is launched while another card is the current one goes by way of Triton."""
    kernel, x = Compiling(), on_second_card(8)
    given = [(x, 5), (x[1:], 5), (x, 6), (x, None), (on_second_card(8, dtype=torch.int32), 5)]
    for arguments in given:
        launch.launch(kernel, (3,), *arguments, MODE="bf16")
    launch.launch(kernel, (4,), x, 5, MODE="bf16")
    launch.launch(kernel, (3,), x, 5, MODE="fp16")
    launch.launch(kernel, (3,), x, 5, MODE="bf16", maxnreg=80)
    assert len(kernel.compiled) == len(given) + 3 and not kernel.run
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launch.launch(kernel, (3,), x, 5, MODE="bf16")
    assert len(kernel.compiled) == len(given) + 4 and not kernel.run


@pytest.mark.parametrize(
    ("system", "installed", "compiler", "headers", "mend"),
    [
        ("win32", False, False, False, 'pip install "triton-windows==3.7.*"'),
        ("win32", True, False, False, "pip install --force-reinstall triton-windows"),
        ("linux", False, True, True, 'pip install "triton==3.7.*"'),
        ("linux", True, False, True, "apt install gcc"),
        ("linux", True, True, False, f"apt install {HEADERS}"),
        ("linux", True, False, False, f"apt install gcc {HEADERS}"),
        ("linux", True, True, True, "pip install --force-reinstall triton"),
    ],
)
def test_the_mend_is_what_is_missing(monkeypatch, tmp_path, system, installed, compiler, headers, mend):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(launch, "triton", object() if installed else None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/gcc" if compiler and name == "gcc" else None)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    if headers:
        (tmp_path / "Python.h").touch()
    assert launch.mend() == mend


def test_triton_is_there_where_it_should_be():
    assert importlib.util.find_spec("triton") is not None or sys.platform != "linux"
