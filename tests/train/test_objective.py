import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_db.families.base import NoiseSchedule
from lowvram_db.train import objective

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def schedule(kind):
    return NoiseSchedule(SCHEDULER.alphas_cumprod, kind)


def columns(kind, timesteps):
    return objective.table(schedule(kind))[timesteps].view(-1, 5, 1, 1, 1).unbind(1)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_noise_and_targets_are_diffusers_own(rows):
    latents, noise = torch.randn(2, rows, 4, 8, 8, generator=torch.Generator().manual_seed(rows))
    timesteps = objective.timesteps(rows, 1000, seed=0, step=0)
    a, b, c, d, _ = columns("v_prediction", timesteps)
    torch.testing.assert_close(a * latents + b * noise, SCHEDULER.add_noise(latents, noise, timesteps))
    torch.testing.assert_close(c * latents + d * noise, SCHEDULER.get_velocity(latents, noise, timesteps))
    a, b, c, d, _ = columns("epsilon", timesteps)
    torch.testing.assert_close(a * latents + b * noise, SCHEDULER.add_noise(latents, noise, timesteps))
    assert torch.equal(c * latents + d * noise, noise)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_equal_the_papers_formula(kind):
    snr = compute_snr(SCHEDULER, torch.arange(1000))
    wanted = torch.minimum(snr, torch.full_like(snr, 5.0)) / (snr if kind == "epsilon" else snr + 1)
    torch.testing.assert_close(objective.table(schedule(kind), 5.0)[:, 4], wanted, rtol=1e-4, atol=1e-7)
    assert (objective.table(schedule(kind))[:, 4] == 1).all()


@pytest.mark.parametrize(("kind", "wanted"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_weight_at_zero_terminal_snr_is_finite(kind, wanted):
    zero = NoiseSchedule(torch.tensor([0.5, 0.0]), kind)
    for gamma in (None, 5.0):
        assert objective.table(zero, gamma).isfinite().all()
    assert objective.table(zero, 5.0)[1, 4].item() == wanted


@settings(max_examples=40)
@given(
    instances=st.integers(1, 4), priors=st.integers(0, 4), prior_weight=st.floats(0, 3), seed=st.integers(0, 2**32 - 1)
)
def test_each_term_is_its_own_mean(instances, priors, prior_weight, seed):
    rows = torch.rand(instances + priors, generator=torch.Generator().manual_seed(seed))
    total = (rows * objective.row_weights(len(rows), instances, prior_weight)).sum()
    loss = objective.split(total, rows, instances)
    exact = rows.double().tolist()
    instance = sum(exact[:instances]) / instances
    prior = sum(exact[instances:]) / priors if priors else 0.0
    assert loss.instance.item() == pytest.approx(instance, rel=1e-5)
    assert loss.prior.item() == pytest.approx(prior, rel=1e-5)
    assert loss.total.item() == pytest.approx(instance + prior_weight * prior, rel=1e-5)


def test_timesteps_are_addressed():
    first = objective.timesteps(3, 1000, seed=1, step=2)
    assert first.dtype == torch.int64
    assert torch.equal(first, objective.timesteps(3, 1000, seed=1, step=2))
    assert torch.equal(first[:1], objective.timesteps(1, 1000, seed=1, step=2)), "a row's does not depend on the others"
    assert not torch.equal(first, objective.timesteps(3, 1000, seed=1, step=3))


def test_timesteps_cover_the_schedule():
    drawn = torch.cat([objective.timesteps(4, 10, seed=0, step=step) for step in range(200)])
    assert sorted(set(drawn.tolist())) == list(range(10))
    assert torch.bincount(drawn).min() > 50
