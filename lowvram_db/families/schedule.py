"""The noise schedule of a model: the one thing, with the prediction type, that is taken from its scheduler's config.

How pictures are drawn is ours: whatever solver the file was written for, its other settings mean nothing to another.
"""

from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from lowvram_db.errors import UserError
from lowvram_db.families.base import NoiseSchedule
from lowvram_db.files.foreign import naming, read_json

_PREDICTION_TYPES = ("epsilon", "v_prediction")
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # that trainer and solver both know
_FEW_STEPS = ("LCMScheduler", "TCDScheduler")
_TIMESTEPS = range(100, 10_001)  # fewer cannot be drawn with in the usual number of steps
_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}  # and diffusers' defaults, where a file says nothing


def read_schedule(folder: Path, prediction_type: str | None = None) -> NoiseSchedule:
    """The noise schedule that stands in the model's scheduler config, which `prediction_type` knows better than. Raises
    UserError for one we cannot train with."""
    path, settings = schedule_file(folder), _settings(folder, prediction_type)
    with naming(path, "no noise schedule can be made of it"):
        alphas_cumprod = DDPMScheduler(**settings).alphas_cumprod.float()
    # At no signal at all the schedule may end, if it is rescaled to; the solver takes care of it then.
    inside = alphas_cumprod[:-1] if settings["rescale_betas_zero_snr"] else alphas_cumprod
    if not ((inside > 0) & (inside < 1)).all() or not (alphas_cumprod.diff() < 0).all():
        raise UserError(f"{path}: its betas make no noise schedule; each must be above 0 and below 1")
    return NoiseSchedule(alphas_cumprod, settings["prediction_type"])


def solver(folder: Path, prediction_type: str | None = None) -> DPMSolverMultistepScheduler:
    """What pictures are drawn with: DPM-Solver++ of second order, which needs 25-30 steps, on the model's schedule.

    A schedule that ends in nothing but noise is begun at its very end (Lin et al. 2024, section 3.3).
    """
    settings = _settings(folder, prediction_type)
    return DPMSolverMultistepScheduler(
        **settings,
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="trailing" if settings["rescale_betas_zero_snr"] else "linspace",
        steps_offset=1,  # without a meaning to these spacings; diffusers' pipeline warns of any other number
    )


def of_few_steps(folder: Path) -> str | None:
    """What to say of a schedule that is a distilled model's, such as Turbo and Lightning; None for another one."""
    config = read_json(schedule_file(folder), "the noise schedule and prediction type stand in it")
    trailing = config.get("timestep_spacing") == "trailing"
    signs = {
        "_class_name": config.get("_class_name") in _FEW_STEPS,
        "timestep_spacing": trailing and config.get("prediction_type", "epsilon") == "epsilon",
    }
    for sign, found in signs.items():
        if found:
            return (
                f"{schedule_file(folder)}: {sign} {config[sign]} is what models have that were distilled to draw in a "
                "few steps (Turbo, Lightning, LCM); training breaks that: the result wants some 30 steps, and guidance"
            )
    return None


def _settings(folder: Path, prediction_type: str | None = None) -> dict[str, Any]:
    path = schedule_file(folder)
    config = read_json(path, "the noise schedule and prediction type stand in it")
    settings = {key: config.get(key, default) for key, default in _BETAS.items()}
    kind = prediction_type or config.get("prediction_type", "epsilon")
    if kind not in _PREDICTION_TYPES:
        raise UserError(f"{path}: prediction_type {kind!r} is not supported; {' and '.join(_PREDICTION_TYPES)} are")
    if settings["beta_schedule"] not in _BETA_SCHEDULES:
        raise UserError(
            f"{path}: beta_schedule {settings['beta_schedule']!r} is not supported; {', '.join(_BETA_SCHEDULES)} are"
        )
    for key in ("beta_start", "beta_end"):
        if not _is_beta(settings[key]):
            raise UserError(f"{path}: {key} {settings[key]!r} is no number above 0 and below 1")
    timesteps, betas = settings["num_train_timesteps"], settings["trained_betas"]
    if type(timesteps) is not int or timesteps not in _TIMESTEPS:
        raise UserError(
            f"{path}: num_train_timesteps {timesteps!r} is no number from {_TIMESTEPS[0]} to {_TIMESTEPS[-1]}"
        )
    if betas is not None and not (isinstance(betas, list) and len(betas) == timesteps and all(map(_is_beta, betas))):
        raise UserError(f"{path}: trained_betas are not {timesteps} numbers above 0 and below 1")
    rescaled = settings["rescale_betas_zero_snr"]
    if type(rescaled) is not bool or (rescaled and kind == "epsilon"):
        raise UserError(
            f"{path}: rescale_betas_zero_snr {rescaled!r} is not supported with {kind}; it is true or false, and true "
            "only with v_prediction: where there is nothing but noise, a predicted noise says nothing"
        )
    return settings | {"prediction_type": kind}


def _is_beta(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1


def schedule_file(folder: Path) -> Path:
    return folder / "scheduler" / "scheduler_config.json"
