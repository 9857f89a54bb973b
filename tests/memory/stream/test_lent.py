"""A network whose weights come from RAM computes, to the bit, what it computes with all of them on the device."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowvram_db.memory.device import lay_out, pick_device
from lowvram_db.memory.stream.lent import Lent, room_for

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


class Network(nn.Module):
    """Large layers of both kinds, two of which share a weight; a small one, and what is no layer that asks."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(8, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.Conv2d(64, 128, 1), nn.Conv2d(128, 32, 3)
        )
        self.small, self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 80), nn.Linear(64, 80, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.small(self.inner(x).movedim(1, -1))
        return self.first(x) + self.second(x.sin())


def network(device, dtype):
    torch.manual_seed(0)
    made = Network().to(dtype)
    lay_out(made, device)
    return made


def inputs(number, device, dtype):
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(number)).to(device, dtype)


@given(
    st.sampled_from(DEVICES),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**32),
    st.lists(st.none() | st.integers(0, 5), min_size=1, max_size=5),
)
def test_it_computes_the_same_also_after_a_pass_that_broke_off(delayed, device, dtype, seed, breaks):
    """breaks: by pass, the layer at which it does."""
    delayed(seed)
    device = pick_device() if device == "cuda" else torch.device(device)
    whole, streamed = network(device, dtype).to(device), network(device, dtype)
    lent = Lent(streamed, device)
    layers = [module for module in streamed.modules() if not list(module.children())]
    with torch.no_grad():
        for number, at in enumerate([*breaks, None]):
            x = inputs(number, device, dtype)
            if at is not None:

                def fail(*_):
                    raise torch.OutOfMemoryError("full")

                with pytest.raises(torch.OutOfMemoryError):
                    hook = layers[at].register_forward_hook(fail)
                    streamed(x)
                hook.remove()
            assert torch.equal(streamed(x), whole(x))
    lent.end()
    for name, weight in whole.state_dict().items():
        assert torch.equal(streamed.state_dict()[name].to(device), weight)


def test_on_the_card_there_is_the_room_and_what_is_small(delayed):
    lanes = delayed(0)
    streamed = network(torch.device("cpu"), torch.float32)
    sizes = [p.nbytes for name, p in streamed.named_parameters() if p.numel() >= 4096 and name.endswith("weight")]
    Lent(streamed, torch.device("cpu"))
    assert len(sizes) == 4
    assert lanes[-1].card_bytes == room_for(sizes) == 2 * max(sizes)
    shown = [p.untyped_storage() for p in streamed.parameters() if p.nbytes in sizes]
    assert {memory.nbytes() for memory in shown} == {2 * max(sizes)}, (
        "the room's, and of no weight is there another copy"
    )
    assert len({memory.data_ptr() for memory in shown}) == 1


def test_given_back_it_takes_another_precision_and_is_lent_again(delayed):
    delayed(0)
    device, x = torch.device("cpu"), inputs(0, "cpu", torch.float32)
    streamed = network(device, torch.bfloat16)
    lent = Lent(streamed, device)
    with torch.no_grad():
        streamed(x.bfloat16())
        lent.end()
        streamed.float()
        again = Lent(streamed, device)
        assert torch.equal(streamed(x), network(device, torch.bfloat16).float()(x))
        again.end()
        assert torch.equal(streamed(x), network(device, torch.bfloat16).float()(x)), "with weights of its own"


def test_a_network_moves_piece_by_piece(growth):
    """RAM never holds it twice: 128 MiB, in pieces of 16."""
    before = """
import torch
from torch import nn
from lowvram_db.memory.stream import lent, pinning
pinning.PIECE = lent.ROOM = 16 * 2**20
network = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(32)])
warm = lent.Lent(nn.Sequential(nn.Linear(64, 64)), torch.device("cpu"))"""
    assert growth(before, "streamed = lent.Lent(network, torch.device('cpu'))") < 64
