"""What does not fit on the device goes on with its weights in RAM, says so once, and computes the same."""

import pytest
import torch
from torch import nn

from lowvram_db.errors import DoesNotFit
from lowvram_db.memory.only_read import OnlyRead
from lowvram_db.memory.stream import pinning

CPU = torch.device("cpu")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
SAID = "pictures: out of memory; the denoiser's weights pass through from RAM from here on"
X = torch.arange(128.0).view(2, 64) / 64


@pytest.fixture(autouse=True)
def _delays(delayed):
    delayed(0)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 96), nn.Linear(96, 4)).to(dtype)


@torch.no_grad()
def result(network):
    return network(X.to(network[0].weight.dtype))


class Fails:
    """Raises an error the first time that it comes to be called, once it is armed."""

    def __init__(self, error=FULL):
        self.error = error

    def __call__(self, *_):
        error, self.error = self.error, None
        if error is not None:
            raise error


def full_at_its_next_move(network):
    """Halfway through."""
    move, fails = network.to, Fails()

    def to(*where):
        if fails.error:
            network[0].to(*where)
        fails()
        return move(*where)

    network.to = to


@pytest.mark.parametrize("way", ["from the first", "when it comes", "when it comes again", "when it computes"])
def test_it_is_streamed_where_it_has_to_be(way, capfd):
    made = network()
    if way == "when it comes":
        full_at_its_next_move(made)
    read = OnlyRead(made, CPU, "pictures", streamed=way == "from the first")
    assert read.is_streamed == (way in ("from the first", "when it comes"))
    if way == "when it comes again":
        read.leave()
        full_at_its_next_move(made)
        read.come()
    if way == "when it computes":
        made[2].register_forward_hook(Fails())
    for _ in range(3):
        assert torch.equal(read.read(lambda: result(read.network)), result(network()))
    assert read.is_streamed
    assert capfd.readouterr().err.count(SAID) == (0 if way == "from the first" else 1)
    read.leave()
    read.come()
    assert read.is_streamed and torch.equal(result(read.network), result(network())), "no further to go"


@pytest.mark.parametrize("way", ["on the device", "with no room there for the other", "in RAM"])
def test_it_takes_another_precision_wherever_it_is(way):
    made = network(torch.float16)
    read = OnlyRead(made, CPU, "pictures", streamed=way == "in RAM")
    if way == "with no room there for the other":
        full_at_its_next_move(made)
    read.convert(torch.float32)
    assert read.is_streamed == (way != "on the device")
    for _ in range(2):
        assert torch.equal(result(read.network), result(network(torch.float16).float()))


def test_what_is_no_lack_of_memory_or_is_one_in_spite_of_all_is_not_hidden(capfd):
    read = OnlyRead(network(), CPU, "pictures")
    with pytest.raises(ZeroDivisionError):
        read.read(Fails(ZeroDivisionError()))
    assert not read.is_streamed
    read.stream()
    with pytest.raises(torch.OutOfMemoryError):
        read.read(Fails())


def test_ram_that_is_not_free_is_said(monkeypatch):
    """It is for what is on the card."""
    read, memory = OnlyRead(network(), CPU, "pictures"), pinning.psutil.virtual_memory()
    monkeypatch.setattr("lowvram_db.memory.only_read._away", lambda network: list(network.parameters()))
    wanted = sum(p.nbytes for p in read.network.parameters())
    monkeypatch.setattr(pinning.psutil, "virtual_memory", lambda: memory._replace(available=wanted - 1))
    with pytest.raises(DoesNotFit, match=r"needs .* GiB of RAM for what passes .* are free; close other programs$"):
        read.stream()
    monkeypatch.setattr(pinning.psutil, "virtual_memory", lambda: memory._replace(available=wanted))
    read.stream()


def test_ram_that_a_wider_precision_takes_is_asked_for(monkeypatch):
    read, memory = OnlyRead(network(torch.float16), CPU, "pictures", streamed=True), pinning.psutil.virtual_memory()
    more = sum(p.nbytes for p in read.network.parameters())
    monkeypatch.setattr(pinning.psutil, "virtual_memory", lambda: memory._replace(available=more - 1))
    with pytest.raises(DoesNotFit, match=r"close other programs$"):
        read.convert(torch.float32)
    monkeypatch.setattr(pinning.psutil, "virtual_memory", lambda: memory._replace(available=more))
    read.convert(torch.float32)
    assert read.is_streamed and torch.equal(result(read.network), result(network(torch.float16).float()))
