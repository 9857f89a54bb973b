"""The check reads the same of a denoiser whose weights come from RAM."""

import pytest
import torch

from lowvram_db import prediction_check as room
from lowvram_db.cache import Store
from lowvram_db.photos import list_photos
from lowvram_db.prediction_check import check_prediction

CPU = torch.device("cpu")
SAID = "the check of what is predicted: out of memory; the denoiser's weights pass through from RAM from here on"


@pytest.fixture
def errors_read(make_config, family, photos, tmp_path, monkeypatch):
    """By a check of the miniature."""
    found = []
    monkeypatch.setattr(room, "spoken_instead", lambda read, said: found.append(read))

    def errors_read(**how):
        with Store(tmp_path / "cache") as store:
            check_prediction(make_config(), family, store, list_photos(photos), CPU, lambda phase: None, **how)
        return found.pop()

    return errors_read


def test_weights_from_ram_are_read_as_those_on_the_device(errors_read, delayed, monkeypatch, family, capfd):
    """By a plan, and where memory turns out not to suffice in the middle."""
    delayed(0)
    wanted = errors_read()
    assert errors_read(streamed=True) == wanted
    load, passes = type(family).load_denoiser, []

    def full_in_its_second_pass(*how):
        denoiser = load(*how)

        def full(*_):
            passes.append(None)
            if len(passes) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        denoiser.mid_block.register_forward_hook(full)
        return denoiser

    monkeypatch.setattr(type(family), "load_denoiser", full_in_its_second_pass)
    assert SAID not in capfd.readouterr().err
    assert errors_read() == wanted
    assert capfd.readouterr().err.count(SAID) == 1 and len(passes) == 6
