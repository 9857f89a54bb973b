"""adam8.cpp, compiled by this machine's C++ compiler for its processor when it is first wanted, and kept.

In the user's cache folder lies one file for every source, compiler, set of flags and processor, named by them and by
its own content: one that a crash has spoiled, or that another processor's machine left in a shared home, is not loaded.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adam8_step import step_numbers

_SOURCE = Path(__file__).with_name("adam8.cpp")
# Sums and products are rounded as they are written. What is left out is the error number of a square root and the traps
# that nobody sets, for the sake of which loops would not become vectors.
_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno",
          "-fno-trapping-math"]  # fmt: skip
_THREADS = "-fopenmp"  # where there is none, a step takes one thread
_FOR_THIS_PROCESSOR = {"x86_64": "-march=native", "amd64": "-march=native",
                       "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}  # fmt: skip
_STORAGE = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_ARGUMENTS = struct.Struct("12Q")  # Tensors in adam8.cpp


def step(
    weight: Tensor,
    residual: Tensor | None,
    grad: Tensor,
    codes: Tensor,
    scales: Tensor,
    unscale: Tensor,
    numbers: Tensor,
    record: Tensor,
    stream: int,
) -> None:
    """As adam8.update_, for tensors on a CPU, with as many threads as torch takes."""
    arguments = _ARGUMENTS.pack(
        weight.data_ptr(), 0 if residual is None else residual.data_ptr(), codes.data_ptr(), scales.data_ptr(),
        numbers.data_ptr(), record.data_ptr(), stream, weight.numel(), _STORAGE[weight.dtype],
        grad.data_ptr(), unscale.data_ptr(), _STORAGE[grad.dtype],
    )  # fmt: skip
    library().adam8_step(arguments, ctypes.c_int64(1), torch.get_num_threads())


class Together:
    """step() of several tensors, in one call, as often as one likes: what is the same each time is written down once.
    For a tensor of some thousand elements a call of its own, from Python, takes longer than its step."""

    def __init__(self, tensors: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]], stream: int):
        """tensors: weight, residual, codes, scales, numbers and record of each, as adam8.update_ has them."""
        self._alive = tensors
        self._weights = [weight.data_ptr() for weight, *_ in tensors]
        self._table = torch.tensor(  # of Tensors in adam8.cpp
            [
                [
                    weight.data_ptr(), 0 if residual is None else residual.data_ptr(), codes.data_ptr(),
                    scales.data_ptr(), numbers.data_ptr(), record.data_ptr(), stream, weight.numel(),
                    _STORAGE[weight.dtype], 0, 0, 0,
                ]
                for weight, residual, codes, scales, numbers, record in tensors
            ]
        )  # fmt: skip

    def is_for(self, weights: Sequence[Tensor]) -> bool:
        """Whether these lie where the weights lay that it was made for."""
        return [weight.data_ptr() for weight in weights] == self._weights

    def step(self, grads: Sequence[Tensor], unscales: Sequence[Tensor]) -> None:
        new = [
            [grad.data_ptr() for grad in grads],
            [unscale.data_ptr() for unscale in unscales],
            [_STORAGE[grad.dtype] for grad in grads],
        ]
        self._table[:, 9:] = torch.tensor(new).T
        address, count = ctypes.c_void_p(self._table.data_ptr()), ctypes.c_int64(len(grads))
        library().adam8_step(address, count, torch.get_num_threads())


def lanes(groups: range, record: Tensor, stream: int) -> Tensor:
    """As bits.lanes of these groups at the address that adam8.update_ tells of, flat: int32 [8 * groups]."""
    blocks = -(-len(groups) // 32)
    random = torch.empty(256 * blocks, dtype=torch.int16)
    pointers = ctypes.c_void_p(record.data_ptr()), ctypes.c_uint64(stream), ctypes.c_void_p(random.data_ptr())
    library().adam8_lanes(ctypes.c_uint64(groups.start), *pointers, ctypes.c_int64(blocks))
    return random[: 8 * len(groups)].int().bitwise_and_(0xFFFF)


@functools.cache
def works() -> bool:
    """Whether step() can be called. The first call compiles, and says in a warning why it cannot, and the mend."""
    try:
        why_not = "" if _steps_right() else "a first step computed nonsense"
    except Exception as error:  # a broken compiler, library or cache folder: anything may come
        why_not = (str(error) or type(error).__name__).splitlines()[0]
    if why_not:
        warnings.warn(
            f"adam8's C++ does not run here ({why_not}); PyTorch's own operations take ten times as long; {mend()}",
            stacklevel=2,
        )
    return not why_not


def mend() -> str:
    """What lets a C++ compiler be found here."""
    if os.environ.get("CXX"):
        return "let CXX name a C++ compiler that works, or unset it"
    if sys.platform == "darwin":
        return "xcode-select --install"
    return "put g++ or clang++ on the PATH" if sys.platform == "win32" else "apt install g++"


@functools.cache
def library() -> Any:
    """adam8.cpp. Raises RuntimeError or OSError where it cannot be compiled or loaded."""
    compiler = _compiler()
    digest = hashlib.sha256(_SOURCE.read_bytes())
    digest.update(repr((compiler, _flags(), _THREADS, _run([*compiler, "--version"]), _processor())).encode())
    key = digest.hexdigest()[:24]
    built = _kept(key) or _keep(key, _compile(compiler))
    try:
        return ctypes.CDLL(str(built))
    except OSError:  # as where nothing may be executed from the cache folder
        return ctypes.CDLL(str(_compile(compiler)))


def _compiler() -> list[str]:
    """The one that torch.compile takes, or another, with its arguments."""
    asked = shlex.split(os.environ.get("CXX", ""))
    for name in asked[:1] or ("g++", "clang++", "c++"):
        found = shutil.which(name)
        if found:
            return [found, *asked[1:]]
    raise RuntimeError(f"CXX names {asked[0]}, which is not there" if asked else "there is no C++ compiler")


def _flags() -> list[str]:
    own = _FOR_THIS_PROCESSOR.get(platform.machine().lower())
    return [*_FLAGS, own] if own else _FLAGS


def _processor() -> str:
    """What it can do, and what it is called where only that is known."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    found = {line for line in lines if line.startswith(wanted)}
    return repr((platform.machine(), platform.processor(), sorted(found)))


def _compile(compiler: list[str]) -> Path:
    """A new library, in a folder of its own that lives as long as this process."""
    folder = tempfile.mkdtemp(dir=_own_folder().name)
    built = Path(folder, "adam8.dll" if sys.platform == "win32" else "adam8.so")
    command = [*compiler, *_flags(), str(_SOURCE), "-o", str(built)]
    try:
        _run([*command, _THREADS])
    except RuntimeError:  # as Apple's, which lacks it
        _run(command)
    return built


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lowvram-db-", ignore_cleanup_errors=True)


def _run(command: list[str]) -> str:
    """What it prints. Raises RuntimeError with its first complaint."""
    english = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=english)
    if done.returncode:
        said = done.stderr.splitlines()
        complaint = next((line for line in said if "error" in line), said[0] if said else "no word of why")
        raise RuntimeError(f"{command[0]} fails: {complaint.strip()}")
    return done.stdout


def _folder() -> Path:
    """Of the user's caches, ours. Raises RuntimeError where no home is known."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    home = Path("Library", "Caches") if sys.platform == "darwin" else Path(".cache")
    return Path(base or Path.home() / home) / "lowvram-db" / "kernels"


def _kept(key: str) -> Path | None:
    """The library kept under this key, if it still is what it was."""
    try:
        return next((file for file in _folder().glob(f"adam8-{key}-*") if _content(file) in file.name), None)
    except (OSError, RuntimeError):
        return None


def _keep(key: str, built: Path) -> Path:
    """Let later processes find it, under its final name all at once: another may look, or do the same. Where nothing
    can be written, this process has its own."""
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as beside:
            copy = shutil.copyfile(built, Path(beside, built.name))
            return copy.replace(folder / f"adam8-{key}-{_content(built)}{built.suffix}")
    except (OSError, RuntimeError):
        return built


def _content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:24]


def _steps_right() -> bool:
    """Whether a first step of lr = 1 goes against the gradient by about 1. Without tensors: they may be fakes now."""
    signs = [1.0 if place % 3 else -1.0 for place in range(300)]
    weight, grad = (ctypes.c_float * 300)(), (ctypes.c_float * 300)(*signs)
    codes, scales, record = (ctypes.c_int16 * 300)(), (ctypes.c_int32 * 2)(), (ctypes.c_int64 * 4)(0, 1, 0, 0)
    numbers = step_numbers(1, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    unscale, given = ctypes.c_float(1), (ctypes.c_float * len(numbers))(*numbers)
    addresses = [ctypes.addressof(array) for array in (codes, scales, given, record)]
    of_all = [ctypes.addressof(weight), 0, *addresses, 0, len(signs), _STORAGE[torch.float32]]
    new = [ctypes.addressof(grad), ctypes.addressof(unscale), _STORAGE[torch.float32]]
    library().adam8_step(_ARGUMENTS.pack(*of_all, *new), ctypes.c_int64(1), 1)
    return record[3] == 0 and all(abs(w + sign) < 0.01 for w, sign in zip(weight, signs, strict=True))
