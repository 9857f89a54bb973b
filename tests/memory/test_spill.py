"""What Windows' counters would answer is made up here: nobody has tried it on such a machine yet."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from lowvram_db.memory import spill
from lowvram_db.memory.spill import Watch, shared_bytes

GIB = 2**30
GPU = torch.device("cuda")


@pytest.fixture
def asked(monkeypatch):
    """Where PowerShell is: its answers, one after the other, the last for good; and the commands that it was given."""
    commands: list[list[str]] = []

    def machine(answers, system="win32"):
        answers = list(answers)

        def run(command, **_):
            commands.append(command)
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if answer is None:
                raise FileNotFoundError(command[0])
            return SimpleNamespace(stdout=f"{answer}\n")

        monkeypatch.setattr(sys, "platform", "win32" if system == "win32" else "linux")
        monkeypatch.setattr(spill, "under_wsl", lambda: system == "wsl")
        monkeypatch.setattr(subprocess, "run", run)
        return commands

    return machine


@pytest.mark.parametrize("system", ["win32", "wsl"])
@pytest.mark.parametrize(
    ("answer", "spilled"),
    [("3221225472", 3 * GIB), ("0", 0), ("", None), ("3221225472,5", 3 * GIB), ("no such class", None), (None, None)],
)
def test_windows_counters_are_read(asked, system, answer, spilled):
    commands = asked([answer], system)
    assert shared_bytes() == spilled
    (command,) = commands
    assert command[0] == {"win32": "powershell", "wsl": "powershell.exe"}[system]
    assert ("pid_" in command[-1]) == (system == "win32"), "Windows knows no process of Linux"


def test_elsewhere_nobody_is_asked(asked):
    commands = asked([str(9 * GIB)], "linux")
    with Watch(GPU, every=0.0):
        assert shared_bytes() is None
    assert commands == []


def test_what_spills_while_it_works_is_said_once(asked, capfd):
    """There were 2 GiB before; 100 MiB more are what every process has."""
    commands = asked([2 * GIB, 2 * GIB + 100 * 2**20, 3 * GIB, 4 * GIB], "wsl")
    with Watch(GPU, every=0.001) as watch:
        watch._thread.join(30)
    assert len(commands) == 3
    error = capfd.readouterr().err
    assert error.count("spilled into system memory") == 1 and error.startswith("1.00 GiB of the GPU's memory")


def test_the_watch_ends_with_the_work(asked):
    commands = asked([2 * GIB], "wsl")
    with Watch(GPU, every=0.001) as watch:
        while len(commands) < 3:
            time.sleep(0.001)
    watch._thread.join(30)
    assert not watch._thread.is_alive()


def test_on_a_cpu_there_is_no_card_to_watch(asked):
    commands = asked([2 * GIB], "wsl")
    with Watch(torch.device("cpu"), every=0.0):
        pass
    assert commands == []
