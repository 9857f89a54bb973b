from pathlib import Path

import pytest
import torch

from lowvram_db.formats.header import Entry
from lowvram_db.formats.prediction import _SCATTERING, prediction_of

V, EPSILON = "v_prediction", "epsilon"


class File:
    """An open file of these tensors."""

    def __init__(self, folder=Path("nowhere"), metadata=None, **tensors):
        self.path, self.metadata, self.tensors = folder / "model.safetensors", metadata or {}, tensors
        self.entries = {key: Entry("F32", tuple(tensor.shape)) for key, tensor in tensors.items()}

    def numbers(self, key):
        return self.tensors[key].tolist()


EMPTY = torch.zeros(0)
SAID = "modelspec.prediction_type"


@pytest.mark.parametrize(
    ("file", "family", "wanted", "found"),
    [
        (File(), "sd1", None, (EPSILON, False)),
        (File(), "sdxl", None, (EPSILON, False)),
        (File(), "sd2", None, (None, False)),
        (File(v_pred=EMPTY), "sdxl", None, (V, False)),
        (File(v_pred=EMPTY, ztsnr=EMPTY), "sdxl", None, (V, True)),
        (File(ztsnr=EMPTY), "sdxl", None, (EPSILON, False)),  # alone it means nothing, as elsewhere
        (File(v_pred=EMPTY, ztsnr=EMPTY), "sdxl", EPSILON, (EPSILON, False)),
        (File(ztsnr=EMPTY), "sdxl", V, (V, True)),
        (File(metadata={SAID: "v"}), "sd1", None, (V, False)),
        (File(metadata={SAID: "epsilon"}), "sd2", None, (EPSILON, False)),
        (File(metadata={SAID: "flow"}), "sdxl", None, (EPSILON, False)),
        (File(metadata={"modelspec.architecture": "stable-diffusion-v2-768-v"}), "sd2", None, (V, False)),
        (File(metadata={SAID: "epsilon"}, v_pred=EMPTY), "sdxl", None, (V, False)),
    ],
)
def test_what_a_file_tells_of_what_it_predicts(file, family, wanted, found):
    kind, how, zero_snr = prediction_of(file, family, wanted)
    assert (kind, zero_snr) == found
    assert how


@pytest.mark.parametrize(("scatter", "found"), [(0.2, V), (0.05, EPSILON), (0.0, None), (torch.nan, None)])
def test_sd_2_by_how_its_weights_scatter(scatter, found):
    bias = scatter * torch.tensor([1.0, -1.0] * 160)
    assert prediction_of(File(**{_SCATTERING: bias}), "sd2").type == found
    assert prediction_of(File(**{_SCATTERING: bias}), "sd1").type == EPSILON


@pytest.mark.parametrize(
    ("yaml", "found"),
    [
        ('model:\n  params:\n    parameterization: "v"\n', V),
        ("model:\n  params:\n    parameterization: eps  \n    scale_factor: 0.18215\n", EPSILON),
        (
            "denoiser_config:\n  scaling_config:\n    target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling\n",
            V,
        ),
        ("target: sgm.modules.diffusionmodules.denoiser_scaling.EpsScaling", EPSILON),
        ("model:\n  params:\n    linear_start: 0.00085\n", None),
        ("", None),
    ],
)
def test_the_config_of_the_original_code_beside_it(tmp_path, yaml, found):
    (tmp_path / "model.yaml").write_text(yaml)
    assert prediction_of(File(tmp_path), "sd2").type == found
    assert prediction_of(File(tmp_path, metadata={SAID: "v"}), "sd2").type == V, "what the file itself says comes first"
