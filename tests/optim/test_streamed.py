"""State, and weights, in RAM: the bits of a step are those of a step beside them, whatever the copies' delays."""

import copy
import random

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_db.memory.layers import can_ask
from lowvram_db.memory.stream.made_up import MadeUpTime
from lowvram_db.memory.stream.ram import Ram
from lowvram_db.optim.adam8 import Adam8
from lowvram_db.optim.placement import state_bytes
from lowvram_db.optim.storage import SMALLEST
from lowvram_db.optim.streamed import Streamed

STEPS = 3


class Rehearsed:
    """A Streamed in made-up time, and its lanes."""

    def __init__(self, events, lent, weights, seed):
        generator = random.Random(seed)
        states = dict.fromkeys(p for p, is_read in events if not is_read)
        sizes = [state_bytes(p.numel(), weights) for p in states] + [-(-p.numel() * 2 // 512) * 512 for p in lent]
        # Too little for all that recomputes at once, and more than enough.
        self.room = int(3 * max(sizes) * generator.uniform(1, 4))
        self.lanes = MadeUpTime(lambda lane, size: size * generator.choice([0.0, 0.1, 1.0, 20.0]) * generator.random())
        ram = Ram(self.lanes, sum(sizes), generator.choice([0, sum(sizes) // 2, sum(sizes)]))
        self.placement = Streamed(events, self.room, ram, self.lanes, lent)


def recorded(unet, loss):
    """What a step does in its order, by the names of larger weights, as Streamed takes it; and the layers of those."""
    large = {p: name for name, p in unet.named_parameters() if p.numel() >= SMALLEST}
    layers = {large[m.weight]: name for name, m in unet.named_modules() if can_ask(m) and m.weight in large}
    step: list[tuple[str, bool]] = []
    hooks = [p.register_hook(lambda _, name=name: step.append((name, False))) for p, name in large.items()]
    hooks += [
        unet.get_submodule(layer).register_forward_pre_hook(lambda *_, name=name: step.append((name, True)))
        for name, layer in layers.items()
    ]
    loss().backward()
    unet.zero_grad()
    for hook in hooks:
        hook.remove()
    return step, layers


@pytest.fixture(scope="module")
def training(miniature):
    def loss_of(unet, step):
        generator = torch.Generator().manual_seed(step)
        latents = torch.randn(1, unet.config.in_channels, 8, 8, generator=generator).to(unet.dtype)
        text = torch.randn(1, 5, unet.config.cross_attention_dim, generator=generator).to(unet.dtype)
        return (unet(latents, step, text).sample - latents).float().square().mean()

    base = UNet2DConditionModel.from_pretrained(miniature / "unet").train()
    base.enable_gradient_checkpointing()
    step, layers = recorded(base, lambda: loss_of(base, 0))

    def placed(unet, weights, seed, lends):
        """Some of the state, or all of it and some weights; what comes out of turn is only late."""
        generator = random.Random(seed)
        names = list(dict.fromkeys(name for name, is_read in step if not is_read))
        share = names if lends else names[: generator.randint(1, len(names))]  # else the others' state is resident
        lent = generator.sample(sorted(layers), generator.randint(1, len(layers))) if lends else []
        events = [(name, is_read) for name, is_read in step if name in (lent if is_read else share)]
        for _ in range(generator.choice([0, 0, 2])):
            events.append(events.pop(generator.randrange(len(events))))
        return Rehearsed(
            [(unet.get_parameter(name), is_read) for name, is_read in events],
            {unet.get_parameter(name): unet.get_submodule(layers[name]) for name in lent},
            weights,
            seed,
        ).placement

    def trained(seed=None, weights="bf16", resume_at=None, breaks_at=None, lends=False):
        """What some steps leave: weights, and the state of the optimizer. seed: of the streaming; resident if None.
        breaks_at: the step in which backward breaks off halfway, as where memory runs out, and is repeated."""

        def anew():
            unet = copy.deepcopy(base)
            placement = None if seed is None else placed(unet, weights, seed, lends)
            optimizer = Adam8(unet.named_parameters(), lr=1e-3, weights=weights, placement=placement)
            optimizer.attach()
            return unet, optimizer

        def breaks(_):
            raise MemoryError

        unet, optimizer = anew()
        values = []
        for step in range(STEPS):
            if step == resume_at:
                state, held = optimizer.state_dict(), kept(unet, optimizer)
                unet, optimizer = anew()
                with torch.no_grad(), optimizer.at_rest():
                    for name, p in unet.named_parameters():
                        optimizer.kept(p).copy_(held[name])
                optimizer.load_state_dict(state)
            if step == breaks_at:
                hook = unet.mid_block.resnets[0].conv1.weight.register_hook(breaks)
                with pytest.raises(MemoryError):
                    loss_of(unet, step).backward()
                hook.remove()
                optimizer.break_off()
                optimizer.state_dict()  # which takes rest, while weights wait for a step that never came
            loss_of(unet, step).backward()
            optimizer.step()
            with torch.no_grad():
                values.append(loss_of(unet, step))  # of a forward pass alone
        with optimizer.at_rest():
            values += [optimizer.exact(p).clone() for p in unet.parameters()]
        state = optimizer.state_dict()["state"]
        # By a copy, for finish() lets the state go.
        values += [v.clone() for s in state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        optimizer.finish()
        return [*values, *(p.detach() for p in unet.parameters())]

    return trained


def kept(unet, optimizer):
    with optimizer.at_rest():
        return {name: optimizer.kept(p).clone() for name, p in unet.named_parameters()}


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def resident(training):
    """What the same steps leave without streaming, made once."""
    made = {}

    def get(**way):
        key = tuple(way.items())
        if key not in made:
            made[key] = training(**way)
        return made[key]

    return get


WAYS = st.sampled_from([{}, {"weights": "bf16+residual"}, {"resume_at": 1}, {"breaks_at": 1}])


@given(st.integers(0, 2**32), WAYS, st.booleans())
@settings(max_examples=10)
def test_streamed_and_resident_give_the_same_bits(training, resident, seed, way, lends):
    assert same(training(seed=seed, lends=lends, **way), resident(**way))


def test_what_is_compared_moves(training, resident):
    assert not any(same(resident(), resident(**way)) for way in ({"weights": "fp32"}, {"breaks_at": 1}))
    assert same(resident(), resident(resume_at=1))


@pytest.mark.parametrize("weights", ["bf16", "bf16+residual"])
def test_only_the_room_is_on_the_card(weights):
    parameters = [torch.nn.Parameter(torch.randn(64, 256)) for _ in range(6)]
    streamed = Rehearsed([(p, False) for p in parameters], {}, weights, seed=0)
    optimizer = Adam8(parameters, weights=weights, placement=streamed.placement)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert streamed.lanes.card_bytes == streamed.room
    crossed = {lane: sum(done.size for done in streamed.lanes.timeline if done.lane == lane) for lane in ("up", "down")}
    state = sum(state_bytes(p.numel(), weights) for p in parameters)
    assert crossed["down"] == state, "each state goes down once a step"
    assert state <= crossed["up"] <= state + streamed.room, "and comes up once, the next step's first ones early"


def test_a_state_that_is_taken_up_replaces_what_is_on_the_card_already():
    def trained(streams):
        parameters = [torch.nn.Parameter(torch.full((64, 128), 1.0)) for _ in range(3)]
        placement = Rehearsed([(p, False) for p in parameters], {}, "bf16", seed=1).placement if streams else None
        optimizer = Adam8(parameters, lr=1e-2, placement=placement)
        saved = copy.deepcopy(optimizer.state_dict())
        for step in range(3):
            for number, p in enumerate(parameters):
                p.grad = torch.full_like(p, 1.0 + number - step)
            optimizer.step()
            if step == 1:
                optimizer.load_state_dict(saved)
        return [p.detach() for p in parameters]

    assert same(trained(streams=True), trained(streams=False))
