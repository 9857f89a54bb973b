import pytest
import torch

from lowvram_db.errors import UserError
from lowvram_db.memory.device import compute_dtype, peak_bytes


def test_peak_memory_of_the_process_grows_with_use():
    before = peak_bytes(torch.device("cpu"))
    block = torch.ones(before, dtype=torch.uint8)
    assert before + block.numel() >= peak_bytes(torch.device("cpu")) > before


def test_a_card_without_bf16_is_told_of_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match=r'Tesla T4 has no bf16 arithmetic; set precision.compute = "fp16"'):
        compute_dtype("bf16", torch.device("cuda"))
    assert compute_dtype("fp16", torch.device("cuda")) == torch.float16
    assert compute_dtype("bf16", torch.device("cpu")) == torch.bfloat16
