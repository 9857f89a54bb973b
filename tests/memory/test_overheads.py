import torch

from lowvram_db.memory import overheads


def test_deterministic_attention_adds_up_in_as_many_copies_as_keep_a_card_busy(monkeypatch):
    """FlashAttention-2's `nsplits`: (multiprocessors + batch * heads - 1) / (batch * heads)."""
    monkeypatch.setattr(overheads, "_card", lambda: (46, 1536))  # an RTX 4070
    query = torch.empty(2, 8, 4096, 40, device="meta", dtype=torch.bfloat16)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    found = []
    for wanted in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda wanted=wanted: wanted)
        found.append(overheads.temporaries(backward, (query, query), ()))
    assert found == [2 * 8 * 4096 * 40 * 4, 3 * 2 * 8 * 4096 * 40 * 4]
