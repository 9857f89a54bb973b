"""Adafactor's step against torch's, and its kernel against its twin."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_db.kernels import adafactor
from lowvram_db.kernels.adafactor import step_numbers, update_
from lowvram_db.kernels.adam8 import SKIPPED, STEP

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ["triton"] if DEVICE == "cuda" else ["triton", "native"]  # on a CPU Triton's are interpreted
DTYPES = {"bf16": torch.bfloat16, "bf16+residual": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Matrix:
    """A weight with its state."""

    def __init__(self, start, mode, kernels="torch"):
        self.weight = start.to(DEVICE, DTYPES[mode], copy=True)
        self.residual = torch.zeros_like(self.weight, dtype=torch.int8) if mode == "bf16+residual" else None
        self.rows, self.columns = (torch.zeros(n, device=DEVICE) for n in start.shape)
        self.record = torch.tensor([7, 0, 3, 0], device=DEVICE)
        self.kernels, self.steps = kernels, 0

    def step(self, grad, lr=1e-3, weight_decay=0.01, unscale=1.0):
        self.steps += 1
        self.record[STEP] = self.steps
        update_(
            self.weight,
            self.residual,
            grad.to(DEVICE, self.weight.dtype),
            self.rows,
            self.columns,
            torch.tensor([unscale], device=DEVICE),
            torch.tensor(step_numbers(self.steps, lr=lr, weight_decay=weight_decay), device=DEVICE),
            self.record,
            16,
            self.kernels,
        )


def gradients(shape, count, seed=0, size=1e-2):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(shape[0], 1, generator=generator) + torch.randn(1, shape[1], generator=generator))
    for _ in range(count):
        yield size * spread * torch.randn(shape, generator=generator)


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(1, 60), st.sampled_from([1e-6, 1e-2, 1e3]), st.floats(0, 0.5))
def test_a_step_is_torchs(rows, columns, size, weight_decay):
    """With eps[1] = 1, more than any root mean square of weights here, torch's relative learning rate is absolute."""
    start = 0.1 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    ours, theirs = Matrix(start, "fp32"), torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adafactor([theirs], lr=1e-3, eps=(1e-15, 1.0), weight_decay=weight_decay)
    for grad in gradients((rows, columns), 6, size=size):
        theirs.grad = grad
        optimizer.step()
        ours.step(grad, weight_decay=weight_decay)
    torch.testing.assert_close(ours.weight.cpu(), theirs.detach(), rtol=0, atol=1e-6)


def test_a_vector_is_a_matrix_of_one_row():
    """Torch keeps every element's square of a vector."""
    start = 0.1 * torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    ours, theirs = Matrix(start, "fp32"), torch.nn.Parameter(start[0].clone())
    optimizer = torch.optim.Adafactor([theirs], lr=1e-3, eps=(1e-15, 1.0), weight_decay=0.01)
    for grad in gradients((1, 300), 6):
        theirs.grad = grad[0]
        optimizer.step()
        ours.step(grad)
    torch.testing.assert_close(ours.weight[0].cpu(), theirs.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 1000), (33, 7), (1, 4096), (300, 1)])
@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_kernel_means_what_its_twin_means(mode, shape, kernels):
    """Roots may differ in the last bit, and a GPU rounds a product and a sum at once: now and then what a weight is
    rounded to differs by a place, of float32 by two, of what it was or is."""
    start = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    twin, kernel = Matrix(start, mode), Matrix(start, mode, kernels)
    for grad in gradients(shape, 3):
        before = twin.weight.float().abs()
        twin.step(grad)
        kernel.step(grad)
        assert torch.equal(twin.rows, kernel.rows) and torch.equal(twin.columns, kernel.columns)
        apart = (twin.weight.float() - kernel.weight.float()).abs()
        place = {"bf16": 2**-7, "bf16+residual": 2**-7, "fp16": 2**-10, "fp32": 2**-22}[mode]
        assert (apart <= place * before.maximum(twin.weight.float().abs()).clamp(min=2**-14)).all()
        assert mode == "fp32" or (apart > 0).float().mean() < 0.01
        kernel.weight.copy_(twin.weight)
        if twin.residual is not None:
            assert (twin.residual != kernel.residual).float().mean() < 0.05
            kernel.residual.copy_(twin.residual)


@pytest.mark.parametrize("kernels", ["torch", *KERNELS])
@pytest.mark.parametrize("mode", DTYPES)
def test_a_gradient_that_is_not_finite_changes_nothing(mode, kernels):
    matrix = Matrix(0.1 * torch.randn(8, 600, generator=torch.Generator().manual_seed(1)), mode, kernels)
    good, _ = gradients((8, 600), 2)
    matrix.step(good)
    before = [tensor.clone() for tensor in (matrix.weight, matrix.rows, matrix.columns)]
    for bad in (math.nan, math.inf):
        grad = good.clone()
        grad[3, 5] = bad
        matrix.step(grad)
    matrix.step(good, unscale=math.nan)
    assert matrix.record[SKIPPED] == 3
    after = (matrix.weight, matrix.rows, matrix.columns)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    matrix.step(good)
    assert not torch.equal(before[0], matrix.weight)


def test_chunks_change_no_bit(monkeypatch):
    """Rows do not end where a draw of eight does."""
    start = 0.1 * torch.randn(50, 37, generator=torch.Generator().manual_seed(1))
    whole, parts = Matrix(start, "bf16"), Matrix(start, "bf16")
    (grad,) = gradients((50, 37), 1)
    whole.step(grad)
    monkeypatch.setattr(adafactor, "CHUNK", 100)
    parts.step(grad)
    assert (whole.weight != parts.weight).float().mean() < 1e-2, "the sum of squares is taken in another order"
    assert torch.equal(whole.columns, parts.columns)


def test_small_updates_of_bf16_weights_are_not_lost():
    """At 1e-5 of a weight, far below its last place: rounded stochastically their mean is the float32 step."""
    start = 1 + torch.rand(64, 256, generator=torch.Generator().manual_seed(1))
    exact, half = Matrix(start.bfloat16().float(), "fp32"), Matrix(start, "bf16")
    for grad in gradients((64, 256), 20):
        for matrix in (exact, half):
            matrix.step(grad.abs(), lr=1e-5, weight_decay=0.0)
    moved, wanted = (m.weight.float().cpu() - start.bfloat16().float() for m in (half, exact))
    assert moved.mean().item() == pytest.approx(wanted.mean().item(), rel=0.1)


def test_the_loss_scale_is_taken_off():
    start = 0.1 * torch.randn(8, 600, generator=torch.Generator().manual_seed(1))
    plain, scaled = Matrix(start, "fp32"), Matrix(start, "fp32")
    for grad in gradients((8, 600), 3):
        plain.step(grad)
        scaled.step(grad * 1024, unscale=1 / 1024)
    torch.testing.assert_close(plain.weight, scaled.weight, rtol=0, atol=1e-7)
