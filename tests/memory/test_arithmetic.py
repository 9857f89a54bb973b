import os
import platform
import subprocess
import sys

import pytest
import torch

from lowvram_db import dreambooth
from lowvram_db.memory.arithmetic import deterministic, is_native

CPU = torch.device("cpu")
ASK = """
import torch
from lowvram_db import doctor
from lowvram_db.memory.arithmetic import is_native
print(*(is_native(dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16, torch.float16)))
print(doctor._bf16())
"""


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(), reason="AVX2 is x86's"
)
def test_a_cpu_of_avx2_has_float32_alone_and_doctor_says_so():
    """oneDNN is told so, in a process of its own, for it looks but once."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=environment)
    answers, line = done.stdout.splitlines()
    assert answers == "True False False"
    assert "absent" in line and "emulated on this CPU, up to 100 times slower; computing in fp32" in line


def test_where_onednn_is_missing_float32_alone_is_sure(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert [is_native(dtype, CPU) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [True, False, False]


def test_onednn_is_asked_of_each_half_precision_by_itself(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for has in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has, raising=False)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda has=has: not has, raising=False)
        assert is_native(torch.bfloat16, CPU) is has and is_native(torch.float16, CPU) is not has


@pytest.mark.parametrize("wanted", [False, True])
def test_a_run_is_deterministic_where_its_config_says_so_and_nothing_after_it(make_config, monkeypatch, wanted):
    before, seen = torch.are_deterministic_algorithms_enabled(), []
    monkeypatch.setattr(dreambooth, "_run", lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
    with deterministic(False):
        dreambooth.run_dreambooth(make_config(train={"deterministic": wanted}))
    assert seen == [wanted or before]
    assert torch.are_deterministic_algorithms_enabled() == before
