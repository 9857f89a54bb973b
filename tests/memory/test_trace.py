import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram_db.memory.overheads import temporaries
from lowvram_db.memory.trace import GRANULE, TEMPORARY, OverLimit, Trace


def test_what_lives_at_the_worst_moment_is_counted_by_label():
    with FakeTensorMode(), Trace() as trace:
        kept = torch.empty(1000)  # 4000 bytes: 4096 with the allocator's rounding
        trace.label("weights", [kept])
        passing = torch.empty(2048)
        del passing
        start = trace.mark()
        last = kept.view(10, 100) * 2
    assert trace.peak() == {"weights": 4096, "": 8192}
    assert trace.peak(start) == {"weights": 4096, "": 4096}
    assert trace.live == 8192
    assert last.shape == (10, 100)


def test_a_view_takes_nothing_and_a_tensor_of_one_byte_takes_a_granule():
    with FakeTensorMode(), Trace() as trace:
        whole = torch.empty(4, 4)
        parts = [whole.t(), whole[1:], whole.view(-1), whole.detach()]
        byte = torch.empty(1, dtype=torch.uint8)
    assert trace.live == 2 * GRANULE
    assert len(parts) == 4 and byte.numel() == 1


def test_gradients_that_are_freed_inside_backward_never_add_up():
    """Ten layers; with a hook that frees each gradient, one is alive at a time."""

    def peak(free: bool) -> int:
        with FakeTensorMode(), Trace() as trace:
            network = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(10)))
            trace.label("weights", network.parameters())
            for weight in network.parameters():
                weight.register_hook(lambda gradient: trace.label("gradients", [gradient]))
                if free:
                    weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
            network(torch.empty(1, 64)).sum().backward()
            return trace.peak()["gradients"]

    one = 64 * 64 * 4
    assert peak(free=False) == 10 * one
    assert peak(free=True) <= one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",)])
def test_gradients_look_as_those_that_are_really_computed(dtype: torch.dtype, affine: bool, frozen: tuple[str, ...]):
    def gradients() -> list[tuple[torch.Size, torch.dtype] | None]:
        norms = nn.GroupNorm(2, 8, affine=affine, dtype=dtype), nn.LayerNorm(5, 1e-5, affine, dtype=dtype)
        network = nn.Sequential(nn.Conv2d(3, 8, 1, dtype=dtype), norms[0], nn.SiLU(), norms[1], nn.GELU())
        for norm in norms:
            for name in frozen if affine else ():
                getattr(norm, name).requires_grad_(False)
        x = torch.zeros(2, 3, 4, 5, dtype=dtype, requires_grad=True)
        network(x).sum().backward()
        wanted = [x.grad, *(weight.grad for weight in network.parameters())]
        return [None if gradient is None else (gradient.shape, gradient.dtype) for gradient in wanted]

    with FakeTensorMode(), Trace():
        traced = gradients()
    assert traced == gradients()


def test_the_limit_stops_the_work():
    with FakeTensorMode(), Trace() as trace:
        trace.limit = 8192
        tensors = [torch.empty(1024), torch.empty(1024)]
        with pytest.raises(OverLimit) as over:
            tensors.append(torch.empty(1024))
    assert over.value.reached == 12288


def test_arithmetic_of_products_convolutions_and_attention():
    with FakeTensorMode(), Trace() as trace:
        torch.empty(8, 16) @ torch.empty(16, 4)
        assert trace.flops == 2 * 8 * 16 * 4
        nn.functional.conv2d(torch.empty(1, 3, 8, 8), torch.empty(5, 3, 3, 3), padding=1)
        assert trace.flops == 2 * 8 * 16 * 4 + 2 * 5 * 8 * 8 * 3 * 9
        before = trace.flops
        q = torch.empty(2, 4, 32, 8)
        nn.functional.scaled_dot_product_attention(q, q, q)
        assert trace.flops - before == 2 * 2 * (2 * 4 * 32 * 32 * 8)


def test_attention_is_the_fused_one_that_keeps_no_scores():
    tokens = 4096
    with FakeTensorMode(), Trace() as trace:
        q = torch.empty(1, 8, tokens, 40, dtype=torch.bfloat16, requires_grad=True)
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert sum(trace.peak().values()) < 8 * tokens * tokens * 2 / 4, "a quarter of one matrix of scores"


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_convolution_needs_once_more_what_does_not_lie_channels_last(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with FakeTensorMode(), Trace(temporaries) as trace:
        x, weight = torch.empty(1, 64, 32, 32), torch.empty(64, 64, 3, 3).to(memory_format=layout).requires_grad_()
        start = trace.mark()
        y = nn.functional.conv2d(x, weight, padding=1)
        copies = x.nbytes + (0 if channels_last else y.nbytes + weight.nbytes)
        assert trace.peak(start)[TEMPORARY] == copies
        start = trace.mark()
        y.backward(torch.empty_like(y))
    assert trace.peak(start)[TEMPORARY] == copies + (0 if channels_last else weight.nbytes), "backward needs y, x and w"


def test_a_bias_has_its_gradient_from_partial_sums_of_all_multiprocessors(monkeypatch):
    """132.5 MiB were seen on an H200."""
    monkeypatch.setattr("lowvram_db.memory.overheads._card", lambda: (132, 2048))
    with FakeTensorMode(), Trace(temporaries) as trace:
        layer = nn.Linear(320, 2560, dtype=torch.bfloat16)
        layer(torch.empty(8192, 320, dtype=torch.bfloat16)).backward(torch.empty(8192, 2560, dtype=torch.bfloat16))
    assert trace.peak()[TEMPORARY] == 132.5 * 2**20


@pytest.mark.parametrize(("rows", "columns"), [(1000, 320), (1, 8192), (8192, 2**20)])
def test_sums_of_few_rows_or_of_very_many_columns_need_nothing_more(rows, columns):
    with FakeTensorMode(), Trace(temporaries) as trace:
        torch.empty(rows, columns).sum(0)
    assert trace.peak()[TEMPORARY] == 0
