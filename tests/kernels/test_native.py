"""The C++ step: its random bits, how it is compiled and kept, and what happens where it cannot be."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.kernels import adam8, bits, native
from lowvram_db.kernels.adam8_step import step_numbers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="compilers here are shell scripts")
WORD = st.integers(0, 2**32 - 1)


@given(st.integers(0, 2**32 - 45), st.integers(0, 2**64 - 1), WORD, WORD, WORD)
def test_random_bits_are_those_of_bits(first, seed, step, tensor, stream):
    record = torch.tensor([seed - 2**64 if seed >= 2**63 else seed, step, tensor, 0])
    ours = native.lanes(range(first, first + 45), record, stream)
    expected = bits.lanes(torch.arange(first, first + 45), seed, step, tensor, stream)
    assert torch.equal(ours, expected.flatten())
    assert torch.equal(bits.lanes(torch.arange(first, first + 45), *record[:3], stream), expected)


@pytest.fixture
def ask_again(monkeypatch, tmp_path):
    """As in a new process, whose cache folder is empty; call it for another one."""

    def again():
        native.works.cache_clear()
        native.library.cache_clear()

    real = native.library()._name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    again()
    yield real, again
    again()


@pytest.fixture
def compiler(ask_again, monkeypatch, tmp_path):
    """One that gives what a true compiler made before; the file with its version, and how often it has compiled."""
    script, calls, version = (tmp_path / name for name in ("compiler", "calls", "version"))
    library = tmp_path / "library"
    shutil.copy(ask_again[0], library)
    version.write_text("1.0\n")
    calls.touch()
    script.write_text(f"""#!/bin/sh
case "$*" in *--version) exec cat {version};; esac
echo >> {calls}
while [ "$1" != -o ]; do shift; done
cp {library} "$2"
""")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"{script} -some -flags")
    return library, version, lambda: len(calls.read_text())


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "lowvram-db" / "kernels").glob("*"))


def test_it_is_compiled_once_for_all_processes(compiler, ask_again, tmp_path):
    *_, compiled = compiler
    for _ in range(3):
        ask_again[1]()
        assert native.works()
    assert compiled() == 1
    assert [Path(native.library()._name)] == kept(tmp_path), "and nothing else lies there"


@pytest.mark.parametrize("changed", ["version", "flags", "processor", "source"])
def test_what_it_was_made_of_is_what_it_is_found_by(compiler, ask_again, monkeypatch, tmp_path, changed):
    _, version, compiled = compiler
    assert native.works()
    if changed == "version":
        version.write_text("1.1\n")
    elif changed == "flags":
        monkeypatch.setenv("CXX", os.environ["CXX"] + " -more")
    elif changed == "processor":
        monkeypatch.setattr(native, "_processor", lambda: "another one")
    else:
        source = tmp_path / "adam8.cpp"
        source.write_text(native._SOURCE.read_text() + "//\n")
        monkeypatch.setattr(native, "_SOURCE", source)
    ask_again[1]()
    assert native.works()
    assert compiled() == len(kept(tmp_path)) == 2


@pytest.mark.parametrize("spoil", [lambda content: content[:5000], lambda content: b"\0" * len(content), lambda _: b""])
def test_a_spoiled_library_is_made_anew(compiler, ask_again, tmp_path, spoil):
    *_, compiled = compiler
    assert native.works()
    (file,) = kept(tmp_path)
    content = file.read_bytes()
    file.unlink()  # this process has it open
    file.write_bytes(spoil(content))
    ask_again[1]()
    assert native.works()
    assert compiled() == 2 and kept(tmp_path) == [file]


@pytest.mark.parametrize("folder", ["a file", "no place", "full"])
def test_where_nothing_can_be_kept_the_process_has_its_own(compiler, monkeypatch, tmp_path, folder):
    if folder == "a file":
        (tmp_path / "cache").write_text("of the user's")
    elif folder == "no place":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("LOCALAPPDATA", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    else:
        monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.works()
    assert not kept(tmp_path)
    assert folder != "a file" or (tmp_path / "cache").read_text() == "of the user's"


def test_a_compiler_without_openmp_gives_one_thread(compiler, ask_again, monkeypatch, tmp_path):
    script = tmp_path / "compiler"
    script.write_text(script.read_text().replace("echo >>", 'case "$*" in *-fopenmp*) exit 1;; esac; echo >>'))
    assert native.works() and compiler[2]() == 1


def test_what_may_not_be_loaded_from_the_cache_is_loaded_from_elsewhere(compiler, monkeypatch, tmp_path):
    """As where home is mounted without execution."""
    load = ctypes.CDLL

    def refusing(path):
        if path.startswith(str(tmp_path / "cache")):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", refusing)
    assert native.works() and kept(tmp_path)


def step_once(kernels):
    weight, grad, ones = torch.zeros(300), torch.ones(300), torch.ones(1)
    state = torch.zeros(300, dtype=torch.int16), torch.zeros(2, dtype=torch.int32)
    numbers = torch.tensor(step_numbers(1, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0))
    record = torch.tensor([0, 1, 0, 0])
    adam8.update_(weight, None, grad, *state, ones, numbers, record, 0, kernels)
    return weight


@pytest.mark.parametrize(
    ("compiler_is", "why", "mend"),
    [
        ("missing", r"there is no C\+\+ compiler", r"apt install g\+\+|xcode-select --install"),
        ("named wrongly", "CXX names g[+][+]-of-old, which is not there", "let CXX name"),
        ("broken", "fails: adam8.cpp:1: error: out of luck", "let CXX name"),
        ("silent", "fails: no word of why", "let CXX name"),
        ("lying", "No such file", "let CXX name"),
        ("wrong", "a first step computed nonsense", "let CXX name"),
        ("older", "undefined symbol: adam8_step", "let CXX name"),
    ],
)
def test_without_it_the_twin_steps_and_one_line_says_why(compiler, monkeypatch, tmp_path, compiler_is, why, mend):
    script = tmp_path / "compiler"
    texts = {
        "broken": "echo In file included: >&2; echo adam8.cpp:1: error: out of luck >&2; echo more >&2; exit 1",
        "silent": "exit 1",
        "lying": "exit 0",
        "wrong": 'while [ "$1" != -o ]; do shift; done; echo "void adam8_step() {}" | cc -shared -x c - -o "$2"',
        "older": 'while [ "$1" != -o ]; do shift; done; echo "void adam7_step() {}" | cc -shared -x c - -o "$2"',
    }
    if compiler_is == "missing":
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    elif compiler_is == "named wrongly":
        monkeypatch.setenv("CXX", "g++-of-old -O2")
    else:
        script.write_text(f'#!/bin/sh\ncase "$*" in *--version) exit;; esac\n{texts[compiler_is]}\n')
    with pytest.warns(UserWarning) as said:
        first = step_once("native")
        assert torch.equal(step_once("native"), first)
    assert len(said) == 1
    line = str(said[0].message)
    assert "\n" not in line and line.startswith("adam8's C++ does not run here (")
    assert re.fullmatch(rf".* \(.*{why}.*\); PyTorch's own operations take ten times as long; ({mend}).*", line)
    assert torch.equal(first, step_once("torch"))
    assert not adam8.steps_at_once("native")


def test_processes_that_compile_at_once_do_not_meet(tmp_path):
    """With the true compiler."""
    program = "from lowvram_db.kernels import native; print(native.works(), native.library()._name)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "error", "-c", program]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0] for process in started}
    (file,) = kept(tmp_path)
    assert said == {f"True {file}\n"}
