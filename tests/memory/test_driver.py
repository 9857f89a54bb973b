"""nvidia-smi is made up: what it says, and what of torch can be installed then."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lowvram_db.memory import driver


@pytest.fixture
def machine(monkeypatch):
    def has(release, capability, system="linux", kernel="6.1.0-49-amd64"):
        answers = {"--query-gpu=driver_version": release, "--query-gpu=compute_cap": capability}

        def run(command, **_):
            answer = answers[command[1]]
            return SimpleNamespace(returncode=0 if answer else 2, stdout=f"{answer}\n{answer}\n")

        monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}" if release else None)
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(platform, "release", lambda: kernel)
        monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")

    return has


@pytest.mark.parametrize(
    ("release", "capability", "system", "mend"),
    [
        ("580.95.05", "8.9", "linux", "torch==2.13.0+cu130"),
        ("595.12", "12.0", "win32", "torch==2.13.0+cu130"),
        ("580.95.05", "6.1", "linux", "torch==2.13.0+cu126"),
        ("570.124.06", "8.6", "linux", "torch==2.13.0+cu126"),
        ("525.60.13", "", "linux", "torch==2.13.0+cu126"),
        ("570.124.06", "12.0", "linux", "update the GPU's driver to 580 or newer (it is 570.124.06)"),
        ("525.60", "8.6", "win32", "update the GPU's driver to 580 or newer (it is 525.60)"),
        ("470.256.02", "7.5", "linux", "update the GPU's driver to 580 or newer (it is 470.256.02)"),
        ("", "", "linux", "install NVIDIA's driver, 580 or newer"),
    ],
)
def test_the_mend_fits_driver_and_card(machine, release, capability, system, mend):
    machine(release, capability, system)
    assert driver.version() == release
    said = driver.mend()
    assert mend in said
    if "+cu" in mend:
        assert said.endswith(f"whl/{mend[-5:]}")


def test_wsl_has_windows_driver(machine):
    machine("527.41", "8.6", kernel="6.6.87.2-microsoft-standard-WSL2")
    assert driver.mend().startswith("update the GPU's driver")


def test_an_nvidia_smi_that_fails_is_no_driver(machine, monkeypatch):
    machine("580.95.05", "8.9")
    failed = SimpleNamespace(returncode=9, stdout="NVIDIA-SMI has failed because it couldn't communicate")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert driver.version() == ""
