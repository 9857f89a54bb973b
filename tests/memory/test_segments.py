"""Whether segments grow is said to PyTorch by its environment, once, and never against the user."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from lowvram_db import cli
from lowvram_db.memory import segments
from lowvram_db.memory.device import pick_device

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    """On Linux, where the user has set nothing."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "release", lambda: "6.1.0-49-amd64")
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back, whoever sets it
        monkeypatch.delenv(name)


def environment():
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_on_the_way_to_a_device_segments_are_made_to_grow():
    assert segments.growing()
    pick_device()
    assert environment() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} and segments.growing()


def test_an_allocator_that_has_read_its_environment_is_told_again(monkeypatch):
    """As it has when bitsandbytes is imported: seen with torch 2.11."""
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    assert pick_device() == torch.device("cuda", 1), "the one that is current, by number"
    assert told == ["expandable_segments:True"]
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:512")
    pick_device()
    assert len(told) == 1, "what the user has set was read already, and would be forgotten"


def test_the_command_line_asks_before_a_library_is_imported(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lowvram-db", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert environment() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("own", "growing"),
    [("max_split_size_mb:128", False), ("expandable_segments: True", True), ("expandable_segments:False", False)],
)
def test_the_users_own_setting_stays(monkeypatch, name, own, growing):
    monkeypatch.setenv(name, own)
    segments.grow()
    assert environment() == {name: own} and segments.growing() == growing


@pytest.mark.parametrize(("system", "release"), [("win32", "11"), ("linux", "6.6.87.2-microsoft-standard-WSL2")])
def test_where_pytorch_has_none_or_fails_with_them_nothing_is_asked_for(monkeypatch, system, release):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    segments.grow()
    assert not environment() and not segments.growing()


def test_under_wsl_the_user_may_ask_for_them(monkeypatch):
    monkeypatch.setattr(platform, "release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert segments.growing()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no segment grows")
def test_a_plan_leaves_more_room_where_segments_do_not_grow():
    """MARGIN is fixed at import, so in a process of its own for each."""
    program = "from lowvram_db.memory.overheads import MARGIN; print(MARGIN)"
    margins = []
    for setting in ("expandable_segments:True", "expandable_segments:False"):
        command = [sys.executable, "-c", f"import os; os.environ[{NAMES[0]!r}] = {setting!r}; {program}"]
        margins.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert margins[0] < 0.055 < margins[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_the_allocator_has_heard():
    program = (
        "import torch, bitsandbytes; from lowvram_db.memory.device import pick_device;"
        "torch.ones(2**24, device=pick_device());"
        "print(all(segment['is_expandable'] for segment in torch.cuda.memory_snapshot()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True" or not segments.growing()
