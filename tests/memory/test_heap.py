"""Freed memory stays with a process on a CPU: counted by the kernel, in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

PAGES = 64 * 2**20 // 4096
COUNT = """
import resource
from lowvram_db.memory.device import pick_device
import torch
assert pick_device().type == "cpu"
def made():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([made() for _ in range(6)][-1])
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")


def pages_of_a_sixth_tensor(**environment):
    """New pages for 64 MiB after as much has been freed some times: the heap settles."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", COUNT]
    without_gpu = {**kept, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=without_gpu)
    return int(done.stdout)


def test_freed_memory_is_used_again():
    assert pages_of_a_sixth_tensor() < PAGES / 10


@pytest.mark.parametrize(
    "own", [{"MALLOC_MMAP_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_what_the_user_has_set_stays(own):
    assert pages_of_a_sixth_tensor(**own) >= PAGES / 2
