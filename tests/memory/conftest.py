import pytest
import torch


@pytest.fixture
def below_torch_cuda(monkeypatch):
    """The allocator's cap by card, as torch.cuda's own functions set and read it where torch has no CUDA: what they
    make of their arguments is part of what is tested."""
    fractions: dict[int, float] = {}
    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr(
        torch._C, "_cuda_setMemoryFraction", lambda share, card: fractions.update({card: share}), raising=False
    )
    monkeypatch.setattr(torch._C, "_cuda_getMemoryFraction", fractions.__getitem__, raising=False)
    return fractions
