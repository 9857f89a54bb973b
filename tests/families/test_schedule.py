import json

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from hypothesis import given
from hypothesis import strategies as st

from lowvram_db.errors import UserError
from lowvram_db.families import open_model
from lowvram_db.families.schedule import of_few_steps, read_schedule, solver

# As the hub has it for Stable Diffusion 1.5.
HUB = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
FOREIGN = [
    {"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho", "solver_order": 2},
    {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver", "solver_order": 3},
    {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    {
        "_class_name": "LCMScheduler",
        "original_inference_steps": 50,
        "timestep_spacing": "leading",
        "thresholding": True,
    },
    {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing", "steps_offset": 0},
    {"_class_name": "DDIMScheduler", "clip_sample": True, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    {"_class_name": "NoSuchScheduler", "solver_type": 5, "variance_type": "learned_range", "solver_order": "two"},
]


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """A model folder with this scheduler config and nothing else."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "scheduler").mkdir()

    def write(settings):
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
        return folder

    return write


def alphas_cumprod(settings):
    root = np.linspace(settings["beta_start"] ** 0.5, settings["beta_end"] ** 0.5, settings["num_train_timesteps"])
    return np.cumprod(1 - root**2)


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda settings: settings["_class_name"])
def test_only_the_schedule_is_taken(copy, edit, foreign):
    """Not the solver that the file was written for, nor its settings; and the saved model keeps the file."""
    drawn = []
    for settings in (HUB, {**HUB, **foreign}):
        path = edit("scheduler/scheduler_config.json", **settings)
        family, before = open_model(str(copy)), path.read_bytes()
        pipeline = family.pipeline()
        assert not pipeline.scheduler.config.use_karras_sigmas
        generator = torch.Generator().manual_seed(0)
        drawn.append(
            pipeline("a ball", num_inference_steps=3, height=64, width=64, generator=generator, output_type="np")
        )
    assert np.isfinite(drawn[0].images).all() and np.array_equal(drawn[0].images, drawn[1].images)
    family.save(copy.parent / "saved", torch.float32, unet=family.load_denoiser())
    assert (copy.parent / "saved" / "scheduler" / path.name).read_bytes() == before


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_solver_is_the_one_diffusers_makes_of_the_hubs_config(write, kind):
    theirs = DPMSolverMultistepScheduler.from_config(PNDMScheduler.from_config(HUB | {"prediction_type": kind}).config)
    ours = solver(write(HUB | {"prediction_type": kind}))
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(25)
    assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.sigmas, theirs.sigmas)
    assert all(theirs.config[key] == value for key, value in ours.config.items() if not key.startswith("_"))


def test_training_and_drawing_have_the_schedule_of_the_file(write):
    schedule = read_schedule(write(HUB))
    torch.testing.assert_close(
        schedule.alphas_cumprod.double(), torch.tensor(alphas_cumprod(HUB)), rtol=1e-4, atol=1e-7
    )
    assert torch.equal(solver(write(HUB)).alphas_cumprod, schedule.alphas_cumprod)
    betas = [0.001 + 0.00001 * number for number in range(1000)]
    trained = write(HUB | {"trained_betas": betas})
    wanted = torch.tensor(np.cumprod(1 - np.array(betas)))
    torch.testing.assert_close(read_schedule(trained).alphas_cumprod.double(), wanted, rtol=1e-4, atol=1e-7)
    assert torch.equal(solver(trained).alphas_cumprod, read_schedule(trained).alphas_cumprod)


def test_a_schedule_that_ends_without_signal(write):
    """Lin et al. (2024), Algorithm 1, in float64; the solver must not divide by nothing there."""
    model = write(HUB | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    root = alphas_cumprod(HUB) ** 0.5
    wanted = torch.tensor(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)
    torch.testing.assert_close(read_schedule(model).alphas_cumprod.double(), wanted, rtol=1e-3, atol=1e-6)
    scheduler = solver(model)
    for steps in (10, 30):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps[0] == 999 and scheduler.sigmas.isfinite().all()
    assert read_schedule(model).ends_in_noise and not read_schedule(write(HUB)).ends_in_noise


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prediction_type": "sample"}, "prediction_type 'sample' is not supported"),
        ({"prediction_type": ["epsilon"]}, "is not supported"),
        ({"beta_schedule": "cosine"}, "beta_schedule 'cosine' is not supported; linear, scaled_linear"),
        ({"beta_schedule": None}, "beta_schedule None is not supported"),
        ({"beta_start": -0.1}, "beta_start -0.1 is no number above 0 and below 1"),
        ({"beta_start": "0.00085"}, "beta_start '0.00085' is no number"),
        ({"beta_end": True}, "beta_end True is no number"),
        ({"beta_end": float("nan")}, "NaN is no finite number"),
        ({"beta_start": 1e-30}, "its betas make no noise schedule"),
        ({"beta_end": 0.99}, "its betas make no noise schedule"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0 is no number from 100 to 10000"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps 1000000000 is no number from"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps 1000.0 is no number from"),
        ({"trained_betas": [0.1] * 999}, "trained_betas are not 1000 numbers"),
        ({"trained_betas": ["0.1"] * 1000}, "trained_betas are not 1000 numbers"),
        ({"trained_betas": "0.1"}, "trained_betas are not 1000 numbers"),
        ({"rescale_betas_zero_snr": True}, "true only with v_prediction"),
        ({"rescale_betas_zero_snr": 1, "prediction_type": "v_prediction"}, "it is true or false"),
    ],
)
def test_what_makes_no_schedule_is_refused(write, changes, words):
    with pytest.raises(UserError, match=rf"scheduler_config\.json: .*{words}"):
        read_schedule(write(HUB | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, False),
        ({"_class_name": "LCMScheduler"}, True),
        ({"_class_name": "TCDScheduler", "prediction_type": "v_prediction"}, True),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, True),
        ({"timestep_spacing": "leading"}, False),
        ({"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, False),
        ({"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, False),
    ],
)
def test_a_schedule_of_few_steps_is_told(write, changes, said):
    remark = of_few_steps(write(HUB | changes))
    assert bool(remark) == said
    assert not said or ("training breaks that" in remark and "scheduler_config.json" in remark)


def test_what_is_predicted_can_be_known_better(write):
    model = write(HUB | {"prediction_type": "sample"})
    for kind in ("epsilon", "v_prediction"):
        assert read_schedule(model, kind).prediction_type == solver(model, kind).config.prediction_type == kind


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2000) | st.floats(-1, 2) | st.text(max_size=3), st.lists, max_leaves=3
)


@given(field=st.sampled_from([*HUB, "rescale_betas_zero_snr", "prediction_type", "timestep_spacing"]), value=JSON)
def test_any_value_makes_a_schedule_or_is_refused(write, field, value):
    model = write(HUB | {field: value})
    try:
        alphas = read_schedule(model).alphas_cumprod
    except UserError as refused:
        assert "\n" not in str(refused)
    else:
        assert alphas[0] < 1 and (alphas.diff() < 0).all() and alphas[-1] > 0
        assert torch.equal(solver(model).alphas_cumprod, alphas)
