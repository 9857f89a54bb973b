import pytest
import torch

from lowvram_db.errors import UserError
from lowvram_db.memory.device import (
    compute_dtype,
    emulation,
    encoder_dtype,
    free_bytes,
    peak_bytes,
    picture_dtypes,
)


def test_peak_memory_of_the_process_grows_with_use():
    before = peak_bytes(torch.device("cpu"))
    block = torch.ones(before, dtype=torch.uint8)
    assert before + 1.1 * block.numel() >= peak_bytes(torch.device("cpu")) > before


def test_a_card_without_bf16_is_told_of_fp16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match=r'Tesla T4 has no bf16 arithmetic; set precision.compute = "fp16"'):
        compute_dtype("bf16", torch.device("cuda"))
    assert compute_dtype("fp16", torch.device("cuda")) == torch.float16


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("setting", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_what_a_cpu_would_emulate_is_trained_drawn_and_encoded_in_float32_and_that_is_said(
    halves_are_native, setting, dtype, native
):
    halves_are_native(native)
    cpu, used = torch.device("cpu"), dtype if native else torch.float32
    assert compute_dtype(setting, cpu) == encoder_dtype(setting, "fp32", cpu) == used
    assert picture_dtypes(setting, cpu) == (used, None)
    assert encoder_dtype("auto", setting, cpu) == compute_dtype("fp32", cpu) == torch.float32
    assert bool(emulation(setting, cpu)) is not native and not emulation("fp32", cpu)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_what_is_free_ends_at_the_allocators_cap(monkeypatch, below_torch_cuda, device):
    """A card of 16,000 bytes: 10,000 free, 2,000 held by the allocator, 500 of them in use."""
    card, answers = torch.device(device), {"memory_reserved": 2000, "memory_allocated": 500}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 16_000))
    for fraction, free in ((1.0, 11_500), (0.5, 7_500)):
        below_torch_cuda[0] = fraction
        assert free_bytes(card) == free
