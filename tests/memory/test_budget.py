import pytest
import torch

from lowvram_db import cli
from lowvram_db.memory.budget import budget_for, cap, crowd, free_bytes
from lowvram_db.memory.overheads import CONTEXT

GIB = 2**30
CARD = torch.device("cuda")


@pytest.fixture
def card(monkeypatch):
    """A GPU of 12 GiB of which others use 3."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * GIB, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)


def test_without_a_card_only_what_is_asked_for_counts():
    assert budget_for(None, torch.device("cpu")) is None
    assert budget_for("8GiB", torch.device("cpu")) == 8 * GIB
    cap(8 * GIB, torch.device("cpu"))


def test_the_default_is_what_the_card_has_free(card):
    assert budget_for(None, CARD) == free_bytes(CARD) == 9 * GIB + CONTEXT
    assert budget_for("8GiB", CARD) == 8 * GIB


def test_more_than_the_card_has_is_said_and_not_taken(card, capfd):
    assert budget_for("16GiB", CARD) == 9 * GIB + CONTEXT
    said = capfd.readouterr().err
    assert "memory.vram: 16GiB is more than the card has (12.00 GiB, 2.50 GiB of it in use by others)" in said


def test_a_plan_for_another_card_can_be_made_and_says_so(card, monkeypatch, make_config, capfd):
    monkeypatch.setattr("shutil.which", lambda program: program)
    monkeypatch.setattr("lowvram_db.memory.device.pick_device", lambda: CARD)
    assert cli._budget(make_config(memory={"vram": "8GiB"})) == 8 * GIB
    assert not capfd.readouterr().err
    assert cli._budget(make_config(memory={"vram": "16GiB"})) == 16 * GIB
    assert "16GiB is more than the card has" in (said := capfd.readouterr().err) and "for another card" in said
    assert cli._budget(make_config()) == free_bytes(CARD)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_the_allocator_is_capped_at_the_budget_less_the_context(card, below_torch_cuda, device):
    cap(6 * GIB + CONTEXT, torch.device(device))
    assert below_torch_cuda == {0: 0.5}


@pytest.mark.parametrize(("free", "words"), [(3, "; other programs hold 5.50 GiB of the card now"), (8, "")])
def test_whoever_runs_out_of_memory_hears_what_others_hold(card, monkeypatch, free, words):
    """Of 12 GiB this process holds its context and 3 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    assert crowd(torch.device("cuda", 0)) == words
    assert crowd(torch.device("cpu")) == ""
