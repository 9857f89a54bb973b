"""The code of Adam's moments: what comes back is what was put in, whatever the spread, the size, the zeros."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_db.kernels import moment_code


@settings(max_examples=30)
@given(
    sigma=st.floats(0, 6),
    magnitude=st.integers(-12, 6),
    n=st.integers(1, 700),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_the_state_keeps_what_it_is_given(sigma, magnitude, n, zeros, seed):
    """sqrt(v) within a level, never zero; u within a place; whatever the spread, the size, the zeros."""
    generator = torch.Generator().manual_seed(seed)
    v = (10.0**magnitude * torch.exp(sigma * torch.randn(n, generator=generator))) ** 2
    v = torch.where(torch.rand(n, generator=generator) < zeros, 0.0, v).clamp(max=2.0**120)
    u = (2 * torch.rand(n, generator=generator) - 1) * 3
    m = u * v.sqrt()
    filled = [torch.nn.functional.pad(x, (0, -n % 256)).view(-1, 256) for x in (m, v)]
    present = torch.nn.functional.pad(torch.ones(n, dtype=torch.bool), (0, -n % 256)).view(-1, 256)
    random = torch.randint(0, 2**16, present.shape, generator=generator, dtype=torch.int32)
    codes, scales, error = moment_code.quantize(*filled, present, random)
    got_u, root = (x.flatten()[:n] for x in moment_code.dequantize(codes, scales))
    kind = (scales & 15).expand_as(codes).flatten()[:n]
    step = torch.tensor([1 / 8, 1 / 16, 1 / 32, 1 / 32, 1 / 64])[kind]
    there = v > moment_code.FAINTEST
    octaves = 2 * (root[there].log2() - v[there].log2() / 2)
    assert (root > 0).all()
    assert (octaves.abs() <= step[there] * 1.001 + 1e-4).all()
    wanted = (m / root)[there]  # the ratio to the root as it is kept
    level = (wanted.abs() + 0.5).square() / (0.5 * torch.where(kind < 3, 33, 66)[there])  # the companding's slope
    assert ((got_u[there] - wanted).abs() <= 0.75 * level + 1e-5).all()
    assert torch.allclose(error.flatten()[:n] + m, got_u * root)


def test_a_block_is_as_fine_as_its_spread_allows():
    for octaves, kind in [(1, 4), (7.9, 4), (8.1, 3), (15.9, 3), (16.1, 2), (31.9, 2), (32.1, 1), (64, 0), (120, 0)]:
        v = torch.full((1, 256), 2.0**-60)
        v[0, 0] = 2.0 ** (-60 + octaves)
        _, scales, _ = moment_code.quantize(torch.zeros_like(v), v, torch.ones_like(v) > 0, torch.zeros(1, 256).int())
        assert (scales & 15).item() == kind, octaves
