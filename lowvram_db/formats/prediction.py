"""What a single file's UNet predicts, and how that is known: other programs have agreed on no one way to say it."""

import math
import re
import statistics
from pathlib import Path
from typing import NamedTuple

from lowvram_db.formats.header import Described

V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"  # empty tensors
SPOKEN = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}  # by ModelSpec
_LONGEST_YAML = 2**20  # bytes
_YAML_SAYS = {
    r"parameterization:\s*[\"']?v[\"']?\s*$": "v_prediction",
    r"parameterization:\s*[\"']?eps[\"']?\s*$": "epsilon",
    r"\.VScaling\b": "v_prediction",
    r"\.EpsScaling\b": "epsilon",
}
# Of Stable Diffusion 2.x: other programs have gone by how this tensor scatters since 2022 (ComfyUI's model detection).
_SCATTERING = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SCATTERS_FOR_V = 0.09


class Prediction(NamedTuple):
    """type: "epsilon" | "v_prediction", or None where nothing tells. how: in words. zero_snr: whether the noise
    schedule ends in noise alone."""

    type: str | None
    how: str
    zero_snr: bool = False


def prediction_of(file: Described, family: str, wanted: str | None = None) -> Prediction:
    """What the UNet of an open file predicts. wanted: what the user says, which goes before everything else."""
    zero_snr = ZERO_SNR_MARKER in file.entries
    if wanted is not None:
        return Prediction(wanted, "as model.prediction_type says", zero_snr and wanted == "v_prediction")
    if V_MARKER in file.entries:
        markers = f"{V_MARKER} and {ZERO_SNR_MARKER}" if zero_snr else V_MARKER
        return Prediction("v_prediction", f"by the marker {markers}", zero_snr)
    spoken = file.metadata.get("modelspec.prediction_type", "").strip().lower()
    if spoken in SPOKEN:
        return Prediction(SPOKEN[spoken], "by modelspec.prediction_type")
    if file.metadata.get("modelspec.architecture", "").lower() == "stable-diffusion-v2-768-v":
        return Prediction("v_prediction", "by modelspec.architecture")
    yaml = file.path.with_suffix(".yaml")
    if (said := _by_yaml(yaml)) is not None:
        return Prediction(said, f"by {yaml.name} beside it")
    if family == "sd2":
        return _by_scatter(file)
    return Prediction("epsilon", "as all of its family do that do not say otherwise")


def _by_yaml(path: Path) -> str | None:
    """What the config of the original code says, as web UIs look for it beside a model."""
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST_YAML).decode("utf-8", "replace")
    except OSError:
        return None
    return next((kind for line, kind in _YAML_SAYS.items() if re.search(line, text, re.MULTILINE)), None)


def _by_scatter(file: Described) -> Prediction:
    if _SCATTERING not in file.entries:
        return Prediction(None, "not said")
    numbers = file.numbers(_SCATTERING)
    scatter = statistics.pstdev(numbers) if all(map(math.isfinite, numbers)) and numbers else 0.0
    if not scatter:
        return Prediction(None, "not said")
    kind = "v_prediction" if scatter > _SCATTERS_FOR_V else "epsilon"
    return Prediction(kind, f"by how the weights scatter ({scatter:.2f}; above {_SCATTERS_FOR_V} it is v)")
