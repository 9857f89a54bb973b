import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_db.families.base import Moments, NoiseSchedule
from lowvram_db.train import objective

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def schedule(kind):
    return NoiseSchedule(SCHEDULER.alphas_cumprod, kind)


def batch(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents, noise, prediction = (torch.randn(rows, 4, 8, 8, generator=generator) for _ in range(3))
    return latents, noise, prediction, torch.randint(0, 1000, (rows,), generator=generator)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_noise_and_targets_are_diffusers_own(rows):
    latents, noise, _, timesteps = batch(rows)
    torch.testing.assert_close(
        objective.add_noise(latents, noise, timesteps, schedule("epsilon")),
        SCHEDULER.add_noise(latents, noise, timesteps),
    )
    assert objective.target(latents, noise, timesteps, schedule("epsilon")) is noise
    torch.testing.assert_close(
        objective.target(latents, noise, timesteps, schedule("v_prediction")),
        SCHEDULER.get_velocity(latents, noise, timesteps),
    )


def test_v_and_epsilon_describe_the_same_latents():
    """x0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v, by the definition of v."""
    latents, noise, _, timesteps = batch(4)
    noisy = objective.add_noise(latents, noise, timesteps, schedule("epsilon"))
    v = objective.target(latents, noise, timesteps, schedule("v_prediction"))
    alpha_bar = SCHEDULER.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * v, latents, atol=1e-5, rtol=1e-5)


def test_the_posterior_has_its_mean_and_variance():
    moments = Moments(torch.tensor([[[[3.0]]]]), torch.tensor([[[[-2.0]]]]))
    normal = objective.draw((4000, 1, 1, 1), 1000, seed=0, step=0).posterior
    samples = objective.sample_posterior(moments, normal)
    deviation = torch.tensor(-1.0).exp()
    assert abs(samples.mean() - 3) < 4 * deviation / 4000**0.5
    assert abs(samples.std() - deviation) < 4 * deviation / 8000**0.5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_equal_the_papers_formula(kind):
    timesteps = torch.arange(1000)
    snr = compute_snr(SCHEDULER, timesteps)
    wanted = torch.minimum(snr, torch.full_like(snr, 5.0)) / (snr if kind == "epsilon" else snr + 1)
    torch.testing.assert_close(objective.min_snr_weights(timesteps, schedule(kind), 5.0), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("kind", "wanted"), [("epsilon", 1.0), ("v_prediction", 0.0)])
def test_min_snr_weight_at_zero_terminal_snr_is_finite(kind, wanted):
    zero = NoiseSchedule(torch.tensor([0.5, 0.0]), kind)
    assert objective.min_snr_weights(torch.tensor([1]), zero, 5.0).item() == wanted


@settings(max_examples=40)
@given(
    instances=st.integers(1, 4),
    priors=st.integers(0, 4),
    prior_weight=st.floats(0, 3),
    weighted=st.booleans(),
    seed=st.integers(0, 100),
)
def test_loss_equals_a_plain_float64_loop(instances, priors, prior_weight, weighted, seed):
    """Row by row in float64: each term is its own mean, and each row carries its own min-SNR weight."""
    _latents, noise, prediction, timesteps = batch(instances + priors, seed)
    weights = objective.min_snr_weights(timesteps, schedule("epsilon"), 5.0) if weighted else None
    terms = []
    for row in range(instances + priors):
        alpha_bar = float(SCHEDULER.alphas_cumprod[timesteps[row]].double())
        snr = alpha_bar / (1 - alpha_bar)
        weight = min(snr, 5.0) / snr if weighted else 1.0
        terms.append(weight * float((prediction[row].double() - noise[row].double()).pow(2).mean()))
    instance = sum(terms[:instances]) / instances
    prior = sum(terms[instances:]) / priors if priors else 0.0
    loss = objective.loss(prediction, noise, weights, instances, prior_weight)
    assert loss.instance.item() == pytest.approx(instance, rel=1e-5)
    assert loss.prior.item() == pytest.approx(prior, rel=1e-5)
    assert loss.total.item() == pytest.approx(instance + prior_weight * prior, rel=1e-5)


def test_min_snr_reaches_the_prior_row_at_batch_one():
    """diffusers' script weighs 2B timesteps against B rows, which at B = 1 broadcasts in silence."""
    prediction, wanted = torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    loss = objective.loss(prediction, wanted, torch.tensor([0.25, 0.5]), 1, 1.0)
    assert (loss.instance.item(), loss.prior.item(), loss.total.item()) == (0.25, 0.5, 0.75)


def test_half_precision_predictions_are_summed_in_float32():
    prediction = torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16)
    assert objective.loss(prediction, torch.zeros(1, 4, 64, 64), None, 1, 1.0).total.item() == 90000.0


def test_draws_are_addressed():
    first = objective.draw((3, 4, 8, 8), 1000, seed=1, step=2)
    again = objective.draw((3, 4, 8, 8), 1000, seed=1, step=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = objective.draw((1, 4, 8, 8), 1000, seed=1, step=2)
    assert torch.equal(first.noise[:1], alone.noise), "a row's noise does not depend on how many rows there are"
    later = objective.draw((3, 4, 8, 8), 1000, seed=1, step=3)
    for one in (first.noise[1], first.posterior[0], later.noise[0]):
        assert not torch.equal(first.noise[0], one)
    assert first.timesteps.dtype == torch.int64


def test_timesteps_cover_the_schedule():
    drawn = torch.cat([objective.draw((4, 1, 1, 1), 10, seed=0, step=step).timesteps for step in range(200)])
    assert sorted(set(drawn.tolist())) == list(range(10))
    assert torch.bincount(drawn).min() > 50
