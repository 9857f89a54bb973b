"""What this machine can do for training, and the one command that mends what it cannot. Each line has been tried."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from lowvram_db.memory import driver, segments, spill
from lowvram_db.memory.arithmetic import is_native
from lowvram_db.memory.device import emulation
from lowvram_db.memory.size import gib

_DISK_WANTED = 20 * 2**30  # a Stable Diffusion 1.5 model, one checkpoint and the result, in float32


@dataclass
class Line:
    """needed: training is not possible unless this is ok."""

    name: str
    state: Literal["ok", "absent", "broken"]
    detail: str
    mend: str = ""
    needed: bool = False


def examine(folder: Path) -> list[Line]:
    """Every check, each by itself: one that fails in a way nobody foresaw is a broken line, not a traceback."""
    checks: dict[str, Callable[[], Line]] = {
        "Python": _python,
        "torch": _torch,
        "GPU": _gpu,
        "bf16": _bf16,
        "attention": _attention,
        "GPU memory": _gpu_memory,
        "RAM": _ram,
        "copies": _copies,
        "bitsandbytes": _bitsandbytes,
        "Triton": _triton,
        "C++": _native,
        "xFormers": _xformers,
        "disk": lambda: _disk(folder),
    }
    return [_tried(name, check) for name, check in checks.items()]


def _tried(name: str, check: Callable[[], Line]) -> Line:
    try:
        return check()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Line(name, "broken", f"{type(error).__name__}: {reason}", _reinstall(name))


def _reinstall(name: str) -> str:
    return f"pip install --force-reinstall {name.lower()}" if name in ("bitsandbytes", "Triton", "xFormers") else ""


def possible(lines: list[Line]) -> bool:
    return all(line.state == "ok" for line in lines if line.needed)


def as_json(lines: list[Line]) -> dict[str, Any]:
    return {"training_possible": possible(lines), "checks": [asdict(line) for line in lines]}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _python() -> Line:
    enough = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Line("Python", "ok" if enough else "broken", detail, "" if enough else "install Python 3.11 or newer", True)


def _torch() -> Line:
    answer = torch.ones(2, requires_grad=True).square().sum()
    answer.backward()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return Line("torch", "ok", f"{torch.__version__} ({build})", needed=True)


def _gpu() -> Line:
    if torch.cuda.is_available():
        product = torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
        if float(product[0, 0]) != 64:
            return Line("GPU", "broken", "a matrix product came out wrong", "update the GPU's driver", True)
        major, minor = torch.cuda.get_device_capability()
        return Line("GPU", "ok", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}", needed=True)
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return Line("GPU", "absent", "CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES")
    there = driver.version()
    if there and not torch.version.cuda:
        return Line("GPU", "broken", f"there is an NVIDIA driver ({there}), but this torch has no CUDA", driver.mend())
    if torch.version.cuda:
        reason = f"its driver ({there}) is too old for CUDA {torch.version.cuda}" if there else "its driver is missing"
        return Line("GPU", "broken", f"torch finds none; {reason} or broken", driver.mend())
    return Line("GPU", "absent", "training runs on the CPU, which is for trying things out", driver.mend())


def _bf16() -> Line:
    if problem := emulation("bf16", _device()):
        return Line("bf16", "absent", problem)
    if not is_native(torch.bfloat16, _device()):
        return Line("bf16", "absent", "this card has none", 'set precision.compute = "fp16"')
    matrix = torch.ones(16, 16, device=_device(), dtype=torch.bfloat16)
    right = float((matrix @ matrix)[0, 0]) == 16
    return Line("bf16", "ok" if right else "broken", f"a matrix product on {_device().type}")


def _attention() -> Line:
    from lowvram_db.memory.attention import preflight

    native = (dtype for dtype in (torch.bfloat16, torch.float16, torch.float32) if is_native(dtype, _device()))
    failure = preflight("sdpa", _device(), next(native))
    detail = f"SDPA {failure}" if failure else f"SDPA, forward and backward on {_device().type}"
    return Line(
        "attention", "broken" if failure else "ok", detail, 'set attention = "xformers"' if failure else "", True
    )


def _gpu_memory() -> Line:
    if _device().type != "cuda":
        return Line("GPU memory", "absent", "no GPU")
    free, total = torch.cuda.mem_get_info()
    detail = f"{gib(free)} free of {gib(total)}"
    if segments.under_wsl() and spill.shared_bytes() is None:
        detail += "; whether it spills into system memory, 10 to 100 times slower, cannot be seen from this WSL"
        return Line("GPU memory", "ok", detail, "enabled=true under [interop] in /etc/wsl.conf, wsl --shutdown")
    return Line("GPU memory", "ok", detail)


def _ram() -> Line:
    memory = psutil.virtual_memory()
    detail = f"{gib(memory.available)} free of {gib(memory.total)}"
    if not segments.under_wsl():
        return Line("RAM", "ok", detail)
    mend = "memory=12GB (or what you can spare) under [wsl2] in .wslconfig in your Windows user folder, wsl --shutdown"
    return Line("RAM", "ok", f"{detail}; WSL takes half of the computer's unless it is told otherwise", mend)


def _copies() -> Line:
    """Between RAM and card, where the optimizer's state may pass."""
    from lowvram_db.memory.stream.rates import measured
    from lowvram_db.plan.waiting import ASSUMED

    if _device().type != "cuda":
        return Line("copies", "absent", f"no GPU; plans go by {ASSUMED}")
    rates = [(kind, measured(_device(), pinned=kind == "pinned")) for kind in ("pinned", "pageable")]
    said = (f"{kind} {rate.up / 1e9:.1f} GB/s up, {rate.down / 1e9:.1f} down" for kind, rate in rates)
    return Line("copies", "ok", "; ".join(said))


def _bitsandbytes() -> Line:
    installed = _version("bitsandbytes")
    if installed is None:
        return Line("bitsandbytes", "absent", 'only optimizer.name = "bnb-adam8" needs it', "pip install bitsandbytes")
    from bitsandbytes.optim import AdamW8bit

    weight = torch.nn.Parameter(torch.ones(4096, device=_device()))
    weight.grad = torch.ones_like(weight)
    optimizer = AdamW8bit(params=[weight], lr=0.1)
    optimizer.step()
    if not bool((weight < 1).all()) or optimizer.state[weight]["state1"].dtype != torch.uint8:
        return Line("bitsandbytes", "broken", f"{installed}: a step did nothing", _reinstall("bitsandbytes"))
    return Line("bitsandbytes", "ok", f"{installed}, stepped on {_device().type}")


def _triton() -> Line:
    from lowvram_db.kernels.launch import interpreted, mend, runs_triton

    installed = _version("triton") or _version("triton-windows")
    if installed is None:
        detail = 'not installed; optimizer.name = "adam8", the default, needs it on a GPU'
        return Line("Triton", "absent", detail, mend() if sys.platform != "darwin" else "")
    if _device().type != "cuda" and not interpreted():
        return Line("Triton", "absent", f"{installed}, which has no compiler for this CPU; needs an NVIDIA GPU")
    try:
        runs_triton("triton", _device())
    except RuntimeError as error:
        return Line("Triton", "broken", f"{installed}: {error}", mend())
    return Line("Triton", "ok", f"{installed}, compiled and ran a kernel" + (" (interpreted)" if interpreted() else ""))


def _native() -> Line:
    from lowvram_db.kernels import native

    if _device().type == "cuda":
        return Line("C++", "absent", "not needed: only on a CPU is adam8 compiled by it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which says what the line says
        if native.works():
            return Line("C++", "ok", "compiled adam8 for this CPU, and made a step with it")
    return Line("C++", "absent", "without it adam8 takes ten times as long on this CPU, or more", native.mend())


def _xformers() -> Line:
    if importlib.util.find_spec("xformers") is None:
        return Line("xFormers", "absent", "not needed: SDPA runs the same kernels", "pip install xformers")
    from lowvram_db.memory.attention import preflight

    dtype = torch.bfloat16 if _device().type == "cuda" and _bf16().state == "ok" else torch.float32
    failure = preflight("xformers", _device(), dtype)
    if failure:
        cuda = (torch.version.cuda or "").replace(".", "")  # PyPI's build is for one release of CUDA
        index = f"pip install -U xformers --index-url https://download.pytorch.org/whl/cu{cuda}"
        return Line("xFormers", "broken", f"not needed, but {failure}", index if cuda else _reinstall("xFormers"))
    return Line("xFormers", "ok", f"{_version('xformers')}, forward and backward on {_device().type}")


def _disk(folder: Path) -> Line:
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < _DISK_WANTED:
        detail = f"{gib(free)} free at {there}; a run of Stable Diffusion 1.5 can take {gib(_DISK_WANTED)}"
        return Line("disk", "broken", detail, "free some space, or set output.dir to another disk")
    return Line("disk", "ok", f"{gib(free)} free at {there}")
