"""What every room's tests build on: a miniature model, a few photos, and a config that trains in a second."""

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Tiny tensors: a second thread costs more than it gives. Set before torch starts its threads, here and in children.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Kernels run on CPU tensors, in Triton's interpreter, where there is no GPU. Set before any kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

from lowvram_db import cli
from lowvram_db.config import Config
from lowvram_db.demo.miniature import write_photos, write_pipeline
from lowvram_db.families import open_model
from lowvram_db.families.base import Family
from lowvram_db.memory.arithmetic import deterministic
from lowvram_db.memory.stream import pinning
from lowvram_db.memory.stream.made_up import MadeUpTime

# A slow moment is no failure, and fixtures of one test may serve all its examples: ours are factories.
_PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("explore", **_PATIENT)  # new examples each time: `make test-slow`
settings.register_profile("the same every time", **_PATIENT, derandomize=True, database=None)
settings.load_profile("the same every time")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


_GROWTH = """
import sys
def peak():  # not that of resource.getrusage, which begins with the parent's
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) // 1024
{before}
reached = peak()
{work}
print(peak() - reached)
"""


@pytest.fixture(scope="session")
def growth() -> Callable[..., int]:
    """By how many MiB the most memory that a process of its own ever held grows with a piece of work, after something
    else; both see the words in sys.argv."""
    if sys.platform != "linux":
        pytest.skip("has no /proc")

    def measure(before: str, work: str, *words: object) -> int:
        command = [sys.executable, "-c", _GROWTH.format(before=before, work=work), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return int(done.stdout.split()[-1])

    return measure


@pytest.fixture(scope="session", autouse=True)
def _signals_are_heard() -> None:
    """Also where the tests were started so that they ignore them, as in the background or under nohup."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _the_same_bits_each_time() -> Iterator[None]:
    with deterministic(torch.cuda.is_available()):
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_no_garbage(miniature: Path) -> None:
    """A run looks for garbage before it loads the next network; all that came with the libraries lives on anyway."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _plans_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans and the C++ step are kept in the user's cache folder; tests that run together have another."""
    own, together = tmp_path_factory.getbasetemp(), "PYTEST_XDIST_WORKER" in os.environ
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str((own.parent if together else own) / "cache"))
        yield


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline in miniature; read only."""
    folder = tmp_path_factory.mktemp("miniature") / "model"
    write_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five photos; read only."""
    folder = tmp_path_factory.mktemp("subject") / "photos"
    write_photos(folder)
    return folder


@pytest.fixture(scope="session")
def family(miniature: Path) -> Family:
    return open_model(str(miniature))


@pytest.fixture(scope="session")
def dog_photos() -> Path:
    """Real photos of the DreamBooth paper's data set, which lie beside the project where it is developed."""
    folder = SHARED_DATA / "dreambench" / "dog"
    if not folder.is_dir():
        pytest.skip(f"the DreamBooth photos are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def clip_vocabulary() -> Path:
    """CLIP's tokenizer as transformers' hub repository has it, which lies beside the project where it is developed."""
    folder = SHARED_DATA / "clip-tokenizer"
    if not folder.is_dir():
        pytest.skip(f"CLIP's tokenizer is not at {folder}")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of the size asked for, where the machine lets us make one."""
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs root and Linux")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def halves_are_native(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Say whether this CPU computes in half precision by itself, whatever it does; a GPU is not seen."""

    def answer(native: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr("lowvram_db.memory.device.is_native", lambda dtype, _: native or dtype == torch.float32)

    return answer


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[MadeUpTime]]:
    """What passes through a CPU from now on: its copies and computations take anything between nothing and very long,
    by a seed. Gives the lanes that are made."""

    def delayed(seed: int) -> list[MadeUpTime]:
        generator, made = random.Random(seed), list[MadeUpTime]()

        def takes(lane: str, size: int) -> float:
            return size * generator.choice([0.0, 0.1, 1.0, 20.0]) * generator.random()

        def made_up(duration: Callable[[str, int], float]) -> MadeUpTime:
            made.append(MadeUpTime(takes))
            return made[-1]

        monkeypatch.setattr(pinning, "MadeUpTime", made_up)
        return made

    return delayed


@pytest.fixture
def make_config(tmp_path: Path, miniature: Path, photos: Path) -> Callable[..., Config]:
    """A config of a run in tmp_path that takes about a second; sections are given as keyword dicts."""

    def make(**sections: dict[str, object]) -> Config:
        defaults: dict[str, dict[str, object]] = {
            "model": {"name": str(miniature)},
            "subject": {"photos": str(photos), "identifier": "pkblz", "class": "ball"},
            "prior": {"count": 3, "steps": 2},
            "train": {"resolution": 64, "steps": 4, "lr": 1e-4, "deterministic": torch.cuda.is_available()},
            "precision": {"compute": "fp32"},
            "sample": {"seeds": 1, "steps": 2, "guidance": [7.0]},
            "checkpoint": {"every": 2},
            "output": {"dir": str(tmp_path / "runs"), "name": "test", "dtype": "fp32"},
        }
        tree = {name: defaults.get(name, {}) | sections.get(name, {}) for name in defaults.keys() | sections.keys()}
        return Config.model_validate(tree)

    return make


@pytest.fixture
def lowvram_db(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lowvram-db", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capfd.readouterr()
        return stopped.value.code or 0, out, err

    return run
