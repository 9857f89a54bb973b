"""Noise and loss in one pass each, beside diffusers and float64 autograd; kernel beside twin."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_db.families.base import NoiseSchedule
from lowvram_db.kernels import bits
from lowvram_db.kernels.noise_loss import _loss_and_gradient, noise_loss, noisy_latents
from lowvram_db.train import objective

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def flow_table(steps=1000):
    """Rectified flow: noisy = (1 - s) latents + s noise, target = noise - latents."""
    s = torch.linspace(0.001, 1, steps)
    return torch.stack([1 - s, s, -torch.ones(steps), torch.ones(steps), torch.ones(steps)], 1)


def table(kind, gamma=None):
    return flow_table() if kind == "flow" else objective.table(NoiseSchedule(SCHEDULER.alphas_cumprod, kind), gamma)


def case(rows=2, size=(4, 8, 8), seed=0, step=5):
    generator = torch.Generator().manual_seed(seed)
    mean, logvar, prediction = torch.randn(3, rows, *size, generator=generator)
    timesteps = torch.randint(0, 1000, (rows,), generator=generator)
    return prediction.to(DEVICE), (mean.to(DEVICE), (logvar - 2).to(DEVICE), timesteps.to(DEVICE)), address(seed, step)


def address(seed, step):
    return torch.tensor([seed, step], device=DEVICE)


def draw(shape, seed, step, stream):
    rows = [bits.normal(shape[1:], seed, step=step, sample=row, stream=stream) for row in range(shape[0])]
    return torch.stack(rows).to(DEVICE)


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("gamma, masked", [(None, False), (5.0, False), (5.0, True)])
def test_loss_and_gradient_are_those_of_float64_autograd(kind, gamma, masked, triton):
    prediction, noised, at = case(rows=3)
    mask = 2 * torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE) if masked else None
    coefficients, weights = table(kind, gamma).to(DEVICE), torch.tensor([0.5, 0.5, 0.7], device=DEVICE)
    prediction.requires_grad_()
    total, rows = noise_loss(prediction, *noised, coefficients, at, weights, mask, triton)
    (3 * total).backward()

    mean, logvar, timesteps = noised
    latents = mean + (0.5 * logvar).exp() * draw(mean.shape, 0, 5, 0)
    _, _, c, d, importance = coefficients[timesteps].double().view(-1, 5, 1, 1, 1).unbind(1)
    exact = prediction.detach().double().requires_grad_()
    importance = importance if mask is None else importance * mask.double()
    wanted = (importance * (exact - c * latents - d * draw(mean.shape, 0, 5, 1)).square()).flatten(1).mean(1)
    (3 * (wanted * weights).sum()).backward()
    torch.testing.assert_close(rows.double(), wanted.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(total.detach().double(), (wanted * weights).sum().detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(prediction.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("triton", [False, True])
def test_noisy_latents_are_diffusers_own(triton):
    _, (mean, logvar, timesteps), at = case()
    latents = mean + (0.5 * logvar).exp() * draw(mean.shape, 0, 5, 0)
    wanted = SCHEDULER.add_noise(latents, draw(mean.shape, 0, 5, 1), timesteps)
    got = noisy_latents(mean, logvar, timesteps, table("epsilon").to(DEVICE), at, triton)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(
    rows=st.integers(1, 3),
    size=st.tuples(st.integers(1, 4), st.integers(1, 33), st.integers(1, 33)),
    seed=st.integers(0, 2**62),
    step=st.integers(0, 2**31),
    masked=st.booleans(),
)
def test_kernels_equal_their_twins_at_any_shape_and_address(rows, size, seed, step, masked):
    prediction, noised, _ = case(rows, size, seed % 1000)
    at, coefficients = address(seed, step), table("v_prediction", 5.0).to(DEVICE)
    torch.testing.assert_close(
        noisy_latents(*noised, coefficients, at, True), noisy_latents(*noised, coefficients, at), rtol=1e-5, atol=1e-5
    )
    mask = torch.rand(rows, 1, *size[1:], device=DEVICE) if masked else None
    weights = torch.rand(rows, device=DEVICE)
    kernel, twin = (_loss_and_gradient(prediction, *noised, coefficients, at, weights, mask, t) for t in (True, False))
    for ours, wanted in zip(kernel, twin, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("triton", [False, True])
def test_a_mask_takes_its_part_out_of_loss_and_gradient(triton):
    prediction, noised, at = case(rows=1)
    coefficients, weights = table("epsilon").to(DEVICE), torch.ones(1, device=DEVICE)
    mask = torch.zeros(1, 1, 8, 8, device=DEVICE)
    mask[..., :4] = 1
    left = _loss_and_gradient(prediction, *noised, coefficients, at, weights, mask, triton)
    right = _loss_and_gradient(prediction, *noised, coefficients, at, weights, 1 - mask, triton)
    whole = _loss_and_gradient(prediction, *noised, coefficients, at, weights, None, triton)
    assert not left[2][..., 4:].any() and not right[2][..., :4].any()
    for a, b, both in zip(left, right, whole, strict=True):
        torch.testing.assert_close(a + b, both)


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_summed_in_float32(dtype, triton):
    """The sum of 4,096 squares of 100 is beyond fp16, and their mean needs more than bf16's 8 bits."""
    prediction = torch.full((1, 4, 32, 32), 100.0, dtype=dtype, device=DEVICE, requires_grad=True)
    zeros = torch.zeros(1, 4, 32, 32, device=DEVICE)
    nothing = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]], device=DEVICE)  # a target of zero
    at, weights = address(0, 0), torch.ones(1, device=DEVICE)
    timesteps = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    total, _ = noise_loss(prediction, zeros, zeros, timesteps, nothing, at, weights, triton=triton)
    total.backward()
    assert total.item() == 10_000
    assert prediction.grad.dtype == dtype
    torch.testing.assert_close(prediction.grad.float(), torch.full_like(zeros, 200 / 4096), rtol=5e-3, atol=0)


def test_a_row_draws_the_same_noise_whatever_stands_beside_it():
    _, (mean, logvar, timesteps), at = case(rows=3)
    whole = noisy_latents(mean, logvar, timesteps, table("epsilon").to(DEVICE), at)
    alone = noisy_latents(mean[:1], logvar[:1], timesteps[:1], table("epsilon").to(DEVICE), at)
    assert torch.equal(whole[:1], alone)
    later = noisy_latents(mean, logvar, timesteps, table("epsilon").to(DEVICE), address(0, 6))
    assert not torch.isclose(whole, later).any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("triton", [False, True])
def test_torch_compile_sees_one_graph(triton):
    prediction, noised, at = case()
    coefficients, weights = table("epsilon").to(DEVICE), torch.ones(2, device=DEVICE)

    def loss(scale):
        noisy = noisy_latents(*noised, coefficients, at, triton)
        return noise_loss(prediction + scale * noisy, *noised, coefficients, at, weights, triton=triton)[0]

    scale = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    (wanted,) = torch.autograd.grad(loss(scale), scale)
    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(scale), scale)
    torch.testing.assert_close(got, wanted)


def test_the_operations_keep_pytorchs_rules():
    prediction, noised, at = case()
    arguments = (*noised, table("epsilon").to(DEVICE), at)
    torch.library.opcheck(noisy_latents, arguments)
    weights = torch.ones(2, device=DEVICE)
    torch.library.opcheck(_loss_and_gradient, (prediction.requires_grad_(), *arguments, weights, None, False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_draws_by_the_address_of_its_replay():
    prediction, noised, at = case()
    coefficients, weights = table("epsilon").to(DEVICE), torch.ones(2, device=DEVICE)
    noise_loss(prediction, *noised, coefficients, at, weights, triton=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        noisy = noisy_latents(*noised, coefficients, at, True)
        total, _ = noise_loss(prediction, *noised, coefficients, at, weights, triton=True)
    for step in (5, 6):
        at.copy_(address(0, step))
        graph.replay()
        torch.testing.assert_close(noisy, noisy_latents(*noised, coefficients, at))
        torch.testing.assert_close(total, noise_loss(prediction, *noised, coefficients, at, weights)[0])
