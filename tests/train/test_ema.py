import pytest
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowvram_db.train.ema import Average, kept
from lowvram_db.train.keeper import Plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def network(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) for shape in [(8, 4, 3, 3), (64, 80), (5,), ()]]
    return {f"part.{place}": nn.Parameter(weight.to(dtype)) for place, weight in enumerate(weights)}


def walk(weights, step):
    """A step of training, of a size that half precision can still tell."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator).to(weight.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@given(decay=st.floats(0.01, 0.9999), steps=st.integers(1, 30))
def test_it_is_the_sum_of_all_weights_as_they_fade(dtype, decay, steps):
    """In float64, by the weight that each step's has in the end."""
    weights = network(dtype)
    average, seen = Average(weights, Plain(), decay), []
    for step in range(1, steps + 1):
        walk(weights, step)
        average.update(step)
        seen.append({name: weight.detach().double() for name, weight in weights.items()})
    shares = [1 if n == 0 else 1 - min(decay, (1 + n) / (10 + n)) for n in range(steps)]
    fades = [share * torch.tensor([1 - later for later in shares[n + 1 :]]).double().prod().item()
             for n, share in enumerate(shares)]  # fmt: skip
    for name, mean in average.weights.items():
        wanted = sum(fade * past[name] for fade, past in zip(fades, seen, strict=True))
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean.double(), wanted, rtol=0, atol=1e-5)


def test_diffusers_average_is_the_same():
    weights = network(torch.float32)
    ours, theirs = Average(weights, Plain(), 0.8), EMAModel(list(weights.values()), decay=0.8)
    for step in range(1, 50):
        walk(weights, step)
        ours.update(step)
        theirs.step(list(weights.values()))
        assert kept(0.8, step) == theirs.cur_decay_value
        for mean, shadow in zip(ours.weights.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(mean, shadow, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_come_back_to_the_bit_also_where_drawing_fails(dtype):
    weights = network(dtype)
    weights["part.0"].data = weights["part.0"].data.to(memory_format=torch.channels_last)
    average = Average(weights, Plain(), 0.9)
    for step in (1, 2, 3):
        walk(weights, step)
        average.update(step)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    places = {name: weight.data_ptr() for name, weight in weights.items()}
    means = {name: mean.clone() for name, mean in average.weights.items()}
    with pytest.raises(ZeroDivisionError), average.in_place():
        for name, weight in weights.items():
            assert weight.dtype == dtype and not torch.equal(weight, before[name])
            assert torch.equal(weight, means[name].to(dtype))
        raise ZeroDivisionError
    for name, weight in weights.items():
        assert torch.equal(weight, before[name]) and weight.data_ptr() == places[name]
        assert torch.equal(average.weights[name], means[name])


@pytest.mark.parametrize("weights", ["bf16", "bf16+residual"])
def test_what_is_known_of_a_weight_is_averaged_not_what_it_was_rounded_to(make_config, make_trainer, weights):
    """Small tensors are known in float32, and with residuals the large ones in 24 bits."""
    config = make_config(
        train={"ema": 0.9, "lr": 1e-3}, precision={"compute": "bf16", "weights": weights}, prior={"enabled": False}
    )
    trainer, seen = make_trainer(config), []
    for _ in range(3):
        trainer.train_step()
        values = [value.double().clone() for value in map(trainer.optimizer.exact, trainer.parameters)]
        seen.append(dict(zip(trainer.trained, values, strict=True)))
    assert trainer.average.weights.keys() == trainer.trained.keys()
    finer = 0
    for name, mean in trainer.average.weights.items():
        wanted = seen[0][name]
        for past, share in ((seen[1], 9 / 11), (seen[2], 9 / 12)):
            wanted = wanted + share * (past[name] - wanted)
        torch.testing.assert_close(mean.double(), wanted, rtol=1e-6, atol=1e-7)
        finer += not torch.equal(seen[2][name], trainer.trained[name].detach().double())
    large = sum(weight.numel() >= 4096 for weight in trainer.parameters)
    small = len(trainer.parameters) - large
    assert finer > small / 2 + (large / 2 if weights == "bf16+residual" else 0) and large
