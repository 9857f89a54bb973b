"""The 16-bit AdamW: state code, update and rounding against float64 and fp32 Adam; kernel beside twin."""

import copy
import math
from collections import Counter
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram_db.formats.source import find_configs
from lowvram_db.kernels import adam8, bits, moment_code
from lowvram_db.kernels.adam8_step import Step, step_numbers
from lowvram_db.memory.trace import Trace
from lowvram_db.optim.storage import SMALLEST

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["torch", "triton", *(["native"] if DEVICE == "cpu" else [])]
MODES = {"bf16": torch.bfloat16, "bf16+residual": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Tensors:
    """A weight and its state, stepped by one of the implementations."""

    def __init__(self, weights: torch.Tensor, mode: str) -> None:
        n = len(weights)
        self.residual = None
        self.place = {"bf16": 2**-7, "bf16+residual": 2**-15, "fp16": 2**-10, "fp32": 2**-23}[mode]  # the last one
        self.weight = weights.to(DEVICE, MODES[mode])
        if mode == "bf16+residual":
            half = torch.full((n,), 0x80, dtype=torch.int32, device=DEVICE)
            self.weight, self.residual = bits.split_bf16(weights.to(DEVICE), half)
        self.codes = torch.zeros(n, dtype=torch.int16, device=DEVICE)
        self.scales = torch.zeros(math.ceil(n / 256), dtype=torch.int32, device=DEVICE)
        self.record = torch.tensor([3, 0, 2, 0], device=DEVICE)
        self.steps = 0

    def step(self, grad, kernels="torch", unscale=1.0, lr=1e-3, weight_decay=0.0, **more):
        self.steps += 1
        numbers = step_numbers(self.steps, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, **more)
        self.record[adam8.STEP] = self.steps
        adam8.update_(
            self.weight,
            self.residual,
            grad.to(DEVICE),
            self.codes,
            self.scales,
            torch.tensor([unscale], device=DEVICE),
            torch.tensor(numbers, device=DEVICE),
            self.record,
            1,
            kernels,
        )

    @property
    def skipped(self):
        return self.record[adam8.SKIPPED].item()

    @property
    def exact(self):
        return self.weight.float() if self.residual is None else bits.join_bf16(self.weight, self.residual)


def gradients(n, sigma, steps, seed=0, signal=0.3):
    """Each element has a scale of its own, lognormal with `sigma` over the tensor, noise, and some drift below it."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1e-4 * torch.exp(sigma * torch.randn(n, generator=generator))
    drift = signal * torch.randn(n, generator=generator)
    for _ in range(steps):
        yield scale * (torch.randn(n, generator=generator) + drift)


def fp64_adam(grads):
    """The sum of all m_hat / (sqrt(v_hat) + eps), and the largest of its terms."""
    m = v = moved = 0.0
    largest = 0.0
    for t, g in enumerate(grads, 1):
        g = g.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        update = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        moved, largest = moved + update, max(largest, update.abs().max().item())
    return moved, largest


# Without foresight each of these is missed, and those of ten steps with a foresight of more than ten. bitsandbytes'
# code reaches .038, .088, 17 and 40 in 600 steps.
@pytest.mark.parametrize(
    ("sigma", "steps", "goal"),
    [(0.5, 600, 0.020), (1.0, 600, 0.024), (2.0, 600, 0.036), (3.0, 600, 0.040), (0.5, 10, 0.015), (1.0, 10, 0.028)],
)
def test_displacement_follows_fp64_adam(sigma, steps, goal):
    n = 8192
    wanted, _ = fp64_adam(gradients(n, sigma, steps))
    ours, largest = Tensors(torch.zeros(n), "fp32"), 0.0
    for g in gradients(n, sigma, steps):
        before = ours.weight.clone()
        ours.step(g, lr=1.0)
        largest = max(largest, (ours.weight - before).abs().max().item())
    error = (-ours.weight.cpu().double() - wanted).norm() / wanted.norm()
    assert error <= goal, f"{error:.4f}"
    assert largest <= 1.6


@pytest.mark.parametrize("mode", ["bf16", "bf16+residual"])
def test_no_update_is_lost_at_dreambooths_learning_rate(mode):
    """1,000 steps at 2e-6 in one direction: 0.2% of a typical weight, each step far below bf16's last place."""
    n, steps, lr = 16_384, 1000, 2e-6
    generator = torch.Generator().manual_seed(0)
    start = 0.03 * torch.randn(n, generator=generator)
    sign = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    ours = Tensors(start, mode)
    begin = ours.exact.clone()
    for _ in range(steps):
        ours.step(1e-4 * sign, lr=lr)
    moved = (begin - ours.exact).cpu() * sign / (lr * steps)
    assert moved.mean().item() == pytest.approx(1.0, abs=0.01)
    rms = (moved - 1).square().mean().sqrt().item()
    assert rms <= (0.11 if mode == "bf16+residual" else 2.1), rms
    nearest = start.bfloat16()
    for _ in range(20):  # what ordinary rounding makes of it: most weights never leave their place
        nearest = (nearest.float() - lr * sign).bfloat16()
    assert (nearest == start.bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [1, 255, 256, 1024, 4099, 9000])
def test_kernel_equals_twin(mode, n):
    """Integer and rounding paths are bit-equal; log2 and exp2 may differ in their last place, and so a code by one."""
    start = 0.05 * torch.randn(n, generator=torch.Generator().manual_seed(n))
    twin, kernel = Tensors(start, mode), Tensors(start, mode)
    for g in gradients(n, 1.5, 4, seed=n):
        g = g.to(torch.float16 if mode == "fp16" else torch.bfloat16)
        twin.step(g, weight_decay=0.01)
        kernel.step(g, "triton", weight_decay=0.01)
    assert torch.equal(twin.scales, kernel.scales)
    difference = [(a.int() - b.int()).abs() for a, b in zip(_codes(twin), _codes(kernel), strict=True)]
    assert max(d.max() for d in difference) <= 1
    assert max((d > 0).float().mean() for d in difference) <= 1e-3
    assert torch.allclose(twin.exact, kernel.exact, rtol=2**-7, atol=1e-8)  # one place of bf16
    assert (twin.weight.float() != kernel.weight.float()).float().mean() <= (1e-3 if mode != "fp32" else 1)


def _codes(tensors):
    """Levels of v and places of m; a block's kind says how many bits each has."""
    code = tensors.codes.int() & 0xFFFF
    place_bits = (6 + ((tensors.scales & 15) >= 3).int()).repeat_interleave(256)[: len(code)]
    return code >> place_bits, code & ((1 << place_bits) - 1)


def decoded(tensors):
    """What a state stands for: levels of v in octaves of its root, and places of u as of 6 bits."""
    codes = torch.nn.functional.pad(tensors.codes, (0, -len(tensors.codes) % moment_code.BLOCK))
    u, root = moment_code.dequantize(codes.view(-1, moment_code.BLOCK), tensors.scales.unsqueeze(1))
    return torch.log2(root).flatten()[: len(tensors.codes)], (u / (u.abs() + 0.5) * 33).flatten()[: len(tensors.codes)]


class NativeBesideTwin:
    """Steps both from the twin's state, again and again.

    Codes differ by one at the most, in fewer than one of 100,000 weights. An ulp of log2 may move the grid of a block,
    of some 50,000: there the same holds for what the codes stand for. Weights, where the codes are the same, are so
    too, or an ulp of m apart, foreseen for nine steps, and a place of their own.
    """

    def __init__(self):
        self.weights = self.differing = self.moved = 0

    def step(self, twin, grad, lr=1e-3, **more):
        native, n = copy.deepcopy(twin), len(grad)
        twin.step(grad, lr=lr, weight_decay=0.01, **more)
        native.step(grad, "native", lr=lr, weight_decay=0.01, **more)
        assert native.skipped == twin.skipped
        coarser = torch.minimum(twin.scales & 15, native.scales & 15)
        level = (0.5 / moment_code._format(coarser).steps).repeat_interleave(256)[:n]
        for one, other, apart in zip(decoded(twin), decoded(native), (level, torch.ones(n)), strict=True):
            assert ((one - other).abs() <= 1.01 * apart).all()
        moved = twin.scales != native.scales
        elsewhere = ~moved.repeat_interleave(256)[:n]
        same = (twin.codes == native.codes) & elsewhere
        distance = (twin.exact - native.exact).abs()[same]
        assert (distance <= twin.place * twin.exact.abs()[same] + lr * 2**-16).all()
        if twin.weight.dtype != torch.float32 and twin.residual is None:
            assert (distance > 0).sum() <= max(1, 1e-4 * n), "random bits are compared with what is cut"
        self.weights += n
        self.moved += int(moved.sum())
        self.differing += int((elsewhere & ~same).sum())

    def check(self):
        assert self.moved <= 1 and self.differing <= 1e-5 * self.weights


SIZES = [1, 255, 256, 257, 4096, 100_001]


@pytest.mark.skipif(DEVICE == "cuda", reason="is for CPUs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mode", MODES)
def test_native_equals_twin(mode, dtype):
    both = NativeBesideTwin()
    for n in SIZES:
        twin = Tensors(0.05 * torch.randn(n, generator=torch.Generator().manual_seed(n)), mode)
        for step, g in enumerate(gradients(n, 1.5, 4, seed=n)):
            g[n // 2] = math.nan if step == 2 else g[n // 2]
            both.step(twin, g.to(dtype))
        assert twin.skipped == 1
    both.check()


@pytest.mark.skipif(DEVICE == "cuda", reason="is for CPUs")
@pytest.mark.parametrize("mode", MODES)
def test_native_equals_twin_over_all_floats(mode):
    """Blocks of one size and of 1e-30 to 1e18, of zeros, and with some; every kind of block; micro-batches; a burst
    late in a run, which the limit holds back."""
    generator = torch.Generator().manual_seed(0)
    width = torch.tensor([0.0, 0.3, 1.0, 3.0, 6.0, 12.0, 24.0]).repeat(40)[:, None]
    middle = torch.empty(len(width), 1).uniform_(-30, 18, generator=generator)
    exponents = middle + width * torch.empty(len(width), 256).uniform_(-1, 1, generator=generator)
    size = 10 ** exponents.clamp(-30, 17)
    size[::9, ::5], size[5] = 0.0, 0.0
    twin, both, kinds = Tensors(torch.randn(size.numel(), generator=generator), mode), NativeBesideTwin(), set()
    for steps, micro_batch, times in [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1), (2000, 0, 1), (2000, 1, 30)]:
        twin.steps = steps
        g = times * size * torch.randn(size.shape, generator=generator)
        both.step(twin, g.flatten(), micro_batch=micro_batch, micro_batches=2)
        kinds |= set((twin.scales & 15).tolist())
    assert kinds == set(range(5)) and twin.skipped == 0
    both.check()


@pytest.mark.skipif(DEVICE == "cuda", reason="is for CPUs")
@pytest.mark.parametrize("mode", MODES)
def test_several_threads_step_as_one(mode):
    n = 2_000_003  # takes long enough for others to come
    start, steps = 0.05 * torch.randn(n, generator=torch.Generator().manual_seed(0)), []
    grads = list(gradients(n, 1.5, 3))
    grads[1][::2048] = math.nan
    threads = torch.get_num_threads()
    for several in (1, 4):
        tensors = Tensors(start, mode)
        try:
            torch.set_num_threads(several)
            for g in grads:
                tensors.step(g, "native")
        finally:
            torch.set_num_threads(threads)
        steps.append(tensors)
    one, four = steps
    assert torch.equal(one.exact, four.exact)
    assert torch.equal(one.codes, four.codes) and torch.equal(one.scales, four.scales)
    assert one.skipped == four.skipped == math.ceil(n / 2048)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e25])
def test_a_gradient_that_is_not_finite_leaves_its_block_alone(kernels, value):
    tensors = Tensors(torch.ones(1000), "fp32")
    tensors.step(torch.ones(1000), kernels)
    before = tensors.weight.clone(), tensors.codes.clone(), tensors.scales.clone()
    grad = torch.ones(1000)
    grad[300] = value
    tensors.step(grad, kernels)
    assert tensors.skipped == 1
    for old, new in zip(before[:2], (tensors.weight, tensors.codes), strict=True):
        assert torch.equal(old[256:512], new[256:512])
    assert torch.equal(before[2][1:2], tensors.scales[1:2])
    assert (before[0][:256] != tensors.weight[:256]).all() and (before[0][512:] != tensors.weight[512:]).all()
    again = tensors.weight.clone()
    tensors.step(torch.ones(1000), kernels, unscale=math.nan)
    assert tensors.skipped == 5
    assert torch.equal(again, tensors.weight)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_zero_gradients_move_nothing_but_by_decay(kernels):
    tensors = Tensors(torch.ones(600), "fp32")
    for _ in range(3):
        tensors.step(torch.zeros(600), kernels, lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(tensors.weight, torch.full_like(tensors.weight, 0.95**3))


def test_what_is_above_the_limit_counts_nine_tenths():
    late = step_numbers(10**5, lr=1.0, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0)
    m = torch.tensor([7.0, -7.0, 1.6, -1.4, 0.0])
    moved = adam8.new_weights(torch.zeros(5), m, torch.ones(5), torch.zeros(5), late)
    torch.testing.assert_close(moved, torch.tensor([-6.3, 6.3, -1.5, 1.4, 0.0]))


def test_unscale_is_what_a_smaller_gradient_would_be():
    plain, scaled = Tensors(torch.zeros(600), "fp32"), Tensors(torch.zeros(600), "fp32")
    for g in gradients(600, 1.0, 4):
        plain.step(g)
        scaled.step(g * 1024, unscale=1 / 1024)
    assert torch.equal(plain.weight, scaled.weight)


def test_micro_batches_follow_their_rule():
    """m gathers the mean of the gradients and v the mean of their squares; the last micro-batch moves the weights."""
    n, parts, steps = 4096, 4, 150
    grads = list(gradients(n, 0.5, parts * steps))
    m = v = wanted = torch.zeros(n, dtype=torch.float64)
    ours = Tensors(torch.zeros(n), "fp32")
    for step in range(1, steps + 1):
        micro = torch.stack(grads[(step - 1) * parts : step * parts]).double()
        m, v = 0.9 * m + 0.1 * micro.mean(0), 0.999 * v + 0.001 * micro.square().mean(0)
        wanted = wanted - m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        for place, g in enumerate(micro.float()):
            ours.steps = step - 1
            ours.step(g, lr=1.0, micro_batch=place, micro_batches=parts)
    error = (ours.weight.cpu() - wanted).norm() / wanted.norm()
    assert error < 0.05, error


class Launches(TorchDispatchMode):
    """Counts operations that would be a kernel on a GPU: all but views and mere allocations."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not (operation.is_view or "empty" in str(operation))
        return operation(*args, **(kwargs or {}))


def twin_of_nothing(n, mode):
    """The twin's step of n weights whose tensors have no values, which counts as a GPU."""
    with torch.device("meta"):
        weight, codes = torch.empty(n, dtype=MODES[mode]), torch.empty(n, dtype=torch.int16)
        residual = torch.empty(n, dtype=torch.int8) if mode == "bf16+residual" else None
        scales, record = torch.empty(math.ceil(n / 256), dtype=torch.int32), torch.empty(4, dtype=torch.int64)
        numbers, unscale, grad = torch.empty(len(Step._fields)), torch.empty(1), torch.empty_like(weight)
        return partial(adam8.update_, weight, residual, grad, codes, scales, unscale, numbers, record, 1, "torch")


@pytest.mark.parametrize("mode", MODES)
def test_without_triton_a_gpu_is_launched_at_most_100_000_times_a_step(mode):
    """Of the UNet of Stable Diffusion 1.5; in a CPU's chunks it would be 4 million."""
    configs = find_configs("stable-diffusion-v1-5/stable-diffusion-v1-5")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet"))
    sizes = Counter(p.numel() for p in unet.parameters() if p.numel() >= SMALLEST)
    launches = 0
    for n, times in sizes.items():
        step = twin_of_nothing(n, mode)
        with Launches() as one:
            step()
        launches += times * (one.count + 4)  # and what the optimizer does of its own for each
    assert 50_000 < launches <= 100_000


@pytest.mark.parametrize("mode", MODES)
def test_what_the_twin_takes_is_what_it_says(mode):
    n = 2**22
    step = twin_of_nothing(n, mode)
    with Trace() as trace:
        start = trace.mark()
        step()
    held = sum(trace.peak(start).values()) - step_arguments(step)
    assert adam8.TWIN_BYTES - 9 <= held / n <= adam8.TWIN_BYTES


@pytest.mark.skipif(DEVICE == "cpu", reason="wants a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_gives_the_twin_no_more_than_that(mode):
    n = adam8.GPU_CHUNK + 4096
    tensors, grad = Tensors(torch.zeros(n), mode), torch.ones(n, dtype=MODES[mode], device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tensors.step(grad)
    assert torch.cuda.max_memory_allocated() - before <= adam8.TWIN_BYTES * adam8.GPU_CHUNK + 2**24


def step_arguments(step):
    return sum(tensor.nbytes for tensor in step.args if torch.is_tensor(tensor))


@pytest.mark.parametrize("mode", MODES)
def test_the_twins_chunks_change_nothing(mode, monkeypatch):
    steps = []
    for chunk in (2**24, 1024):
        monkeypatch.setattr(adam8, "chunk_of", lambda device, chunk=chunk: chunk)
        tensors = Tensors(0.05 * torch.randn(4099, generator=torch.Generator().manual_seed(1)), mode)
        for g in gradients(4099, 1.5, 3):
            tensors.step(g)
        steps.append(tensors)
    whole, chunked = steps
    assert torch.equal(whole.exact, chunked.exact)
    assert torch.equal(whole.codes, chunked.codes) and torch.equal(whole.scales, chunked.scales)
