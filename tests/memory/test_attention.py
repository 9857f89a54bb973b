import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lowvram_db.demo.miniature import write_sd2
from lowvram_db.errors import UserError
from lowvram_db.families import open_model
from lowvram_db.memory import attention
from lowvram_db.memory.attention import preflight, use_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sdpa_passes_its_trial(dtype):
    assert preflight("sdpa", CPU, dtype) is None


def test_scores_beyond_fp16_s_numbers_are_none_of_its_arithmetic(family):
    """As Stable Diffusion 2.x has them: such attention is exact in the training's own arithmetic, forward and back."""
    denoiser = family.load_denoiser()
    use_attention(denoiser, "auto", CPU, torch.float16)
    layer = next(module for name, module in denoiser.named_modules() if name.endswith(".attn1"))
    with torch.no_grad():
        for projection in (layer.to_q, layer.to_k):
            projection.weight.copy_(torch.eye(*projection.weight.shape) * 512)
    x = 4 * torch.eye(16, layer.to_q.in_features)[None]
    assert (layer.to_q(x) @ layer.to_k(x).mT).max() > 4 * torch.finfo(torch.float16).max
    results = []
    for network, inputs in ((layer, x), (copy.deepcopy(layer).half(), x.half())):
        leaf = inputs.clone().requires_grad_()
        output = network(leaf)
        results.append((output.detach().float(), torch.autograd.grad(output.float().sum(), leaf)[0].float()))
    for wanted, got in zip(*results, strict=True):
        assert got.isfinite().all() and (got - wanted).norm() < attention._TOLERANCE * wanted.norm()


def test_wrong_gradients_are_found(monkeypatch):
    """xFormers built for another torch gives a right output and NaN gradients."""

    def broken(q, k, v):
        q = q.clone()
        q.register_hook(lambda gradient: gradient * float("nan"))
        return scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", broken)
    assert "wrong results on cpu at head width 40" in str(preflight("sdpa", CPU, torch.float32))


def test_an_unscaled_output_is_found(monkeypatch):
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v)
    assert "wrong results" in str(preflight("sdpa", CPU, torch.float32))


def test_what_does_not_run_says_why(monkeypatch):
    def broken(*qkv):
        raise ValueError

    monkeypatch.setattr(attention, "scaled_dot_product_attention", broken)
    assert preflight("sdpa", CPU, torch.float32) == "does not run on cpu: ValueError"


def test_a_full_card_is_not_taken_for_a_broken_backend(monkeypatch):
    def full(*qkv):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(attention, "scaled_dot_product_attention", full)
    with pytest.raises(torch.OutOfMemoryError):
        preflight("sdpa", CPU, torch.float32)


def test_auto_takes_sdpa(family):
    assert use_attention(family.load_denoiser(), "auto", CPU, torch.float32) == "sdpa"


def test_xformers_that_cannot_run_is_refused_by_name(family):
    """Here it is not installed, or has no kernel for a CPU; either is named with the mend."""
    with pytest.raises(UserError, match=r'attention: xformers .*; set attention = "sdpa"'):
        use_attention(family.load_denoiser(), "xformers", CPU, torch.float32)


def test_auto_falls_back_to_xformers(family, monkeypatch):
    chosen = []
    denoiser = family.load_denoiser()
    monkeypatch.setattr(denoiser, "enable_xformers_memory_efficient_attention", lambda: chosen.append("xformers"))
    monkeypatch.setattr(attention, "preflight", lambda backend, *_: "is broken" if backend == "sdpa" else None)
    assert use_attention(denoiser, "auto", CPU, torch.float32) == "xformers"
    assert chosen == ["xformers"]


def test_sd2s_attention_does_not_overflow_where_a_product_in_fp16_would(tmp_path):
    """One number of every head is large and the same in all of queries and keys: it leaves the softmax what it is, and
    their products beyond what fp16 holds. That is what SD 2's `upcast_attention` is about."""
    write_sd2(tmp_path / "model")
    results = []
    for dtype in (torch.float32, torch.float16):
        denoiser = open_model(str(tmp_path / "model")).load_denoiser().to(dtype)
        use_attention(denoiser, "sdpa", CPU, dtype)
        layer = denoiser.mid_block.attentions[0].transformer_blocks[0].attn1
        x = torch.randn(2, 16, layer.query_dim, generator=torch.Generator().manual_seed(0))
        x[..., 0] = 1
        with torch.no_grad():
            for projection in (layer.to_q, layer.to_k):
                first = projection.weight.view(layer.heads, -1, layer.query_dim)[:, 0]
                first.zero_()[:, 0] = 400
        x = x.to(dtype).requires_grad_()
        output = layer(x)
        output.float().square().sum().backward()
        results.append([output.detach(), x.grad[..., 1:], layer.to_v.weight.grad])
    queries, keys = (projection(x).unflatten(-1, (layer.heads, -1)) for projection in (layer.to_q, layer.to_k))
    assert (queries * keys).sum(-1, dtype=torch.float16).isinf().all(), "a plain product overflows"
    for wanted, got in zip(*results, strict=True):
        assert (got.float() - wanted).norm() <= 0.01 * wanted.norm()
