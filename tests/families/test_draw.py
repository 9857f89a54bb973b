import numpy as np
import pytest
import torch

from lowvram_db.errors import UserError
from lowvram_db.families.draw import draw
from lowvram_db.memory.device import picture_dtypes


class Pipeline:
    """Draws the first numbers of its generators, or what is no number, in the precisions that are named."""

    class image_processor:
        @staticmethod
        def numpy_to_pil(pixels):
            return list(pixels)

    def __init__(self, overflows_in):
        self.dtype, self.overflows_in = torch.float16, overflows_in

    def to(self, dtype):
        self.dtype = dtype

    def __call__(self, generator, output_type, num_images_per_prompt):
        assert num_images_per_prompt == len(generator)
        pixels = np.stack([torch.rand(4, 4, generator=one).numpy() for one in generator])
        if self.dtype in self.overflows_in:
            pixels[-1, 0, 0] = np.nan
        return type("Output", (), {"images": pixels})


def first_numbers(seed):
    return torch.rand(4, 4, generator=torch.Generator().manual_seed(seed)).numpy()


def test_what_overflows_in_fp16_is_drawn_again_from_the_same_noise_and_said_once(capfd):
    pipeline = Pipeline({torch.float16})
    for seeds in ([3, 4], [5]):
        pictures = draw(pipeline, seeds, torch.bfloat16)
        assert all(np.array_equal(picture, first_numbers(seed)) for picture, seed in zip(pictures, seeds, strict=True))
    assert pipeline.dtype == torch.bfloat16
    assert capfd.readouterr().err.count("overflows in fp16: its pictures are drawn in bfloat16 from here on") == 1


@pytest.mark.parametrize(
    ("overflows_in", "wider"), [({torch.float16, torch.bfloat16}, torch.bfloat16), ({torch.float16}, None)]
)
def test_what_is_no_number_in_the_wider_precision_either_is_refused(overflows_in, wider):
    pipeline = Pipeline(overflows_in)
    with pytest.raises(UserError, match="no numbers"):
        draw(pipeline, [0], wider)
    assert pipeline.dtype == (wider or torch.float16), "weights that are somebody else's stay as they are"


@pytest.mark.parametrize(
    ("compute", "on_a_gpu"),
    [
        ("bf16", (torch.float16, torch.bfloat16)),
        ("fp16", (torch.float16, torch.float32)),
        ("fp32", (torch.float32, None)),
    ],
)
def test_pictures_are_drawn_in_the_finer_of_two_half_precisions(monkeypatch, compute, on_a_gpu):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert picture_dtypes(compute, torch.device("cuda")) == on_a_gpu
    assert picture_dtypes(compute, torch.device("cpu"))[1] is None
