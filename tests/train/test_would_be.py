"""What a run would have made of a checkpoint, by checkpoints whose every tensor is of another number."""

import pytest
import torch

from lowvram_db.errors import UserError
from lowvram_db.train import checkpoint, would_be


@pytest.fixture
def saved(make_config, tmp_path):
    """A checkpoint of tensors by these names, numbered from 0: what is trained, its average, what is frozen since."""

    def save(trained, average=(), frozen=()):
        numbers = iter(range(99))
        trained, average, frozen = (
            {name: torch.full((2,), float(next(numbers))) for name in names} for names in (trained, average, frozen)
        )
        state = checkpoint.State(3, make_config(), {}, {}, {}, {})
        optimizer = torch.optim.AdamW([torch.nn.Parameter(tensor) for tensor in trained.values()])
        contents = checkpoint.contents(state, trained, optimizer, average, frozen)
        checkpoint.save(tmp_path / "step-000003", contents)
        return tmp_path / "step-000003"

    return save


def numbers(folder):
    state = would_be.made_of(folder)
    checkpoint.check_files(folder, state)
    return {name: tensor[0].item() for name, tensor in would_be.Weights(folder, state).items()}


def test_without_an_average_it_is_what_was_trained_and_what_is_frozen_since(saved):
    folder = saved(["unet.a", "text_encoder.a"], frozen=["text_encoder_2.a"])
    (folder / checkpoint.OPTIMIZER).unlink()
    assert numbers(folder) == {"unet.a": 0, "text_encoder.a": 1, "text_encoder_2.a": 2}


def test_of_an_average_what_was_trained_is_not_asked_for(saved):
    folder = saved(["unet.a"], average=["unet.a"], frozen=["text_encoder.a"])
    for name in (checkpoint.OPTIMIZER, "unet.safetensors"):
        (folder / name).write_bytes(b"")
    assert numbers(folder) == {"unet.a": 1, "text_encoder.a": 2}


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_a_file_that_cannot_be_read_is_named(saved, damage):
    folder = saved(["unet.a"])
    (folder / "unet.safetensors").unlink()
    if damage is not None:
        (folder / "unet.safetensors").write_bytes(damage)
    with pytest.raises(UserError, match=r"step-000003: damaged \("):
        would_be.Weights(folder, would_be.made_of(folder))
