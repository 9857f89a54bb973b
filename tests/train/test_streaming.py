"""A trainer whose state lives in RAM is, to the bit, one whose state does not; the way may change at any step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowvram_db.demo.miniature import write_sdxl
from lowvram_db.errors import DoesNotFit
from lowvram_db.families import open_blank
from lowvram_db.memory.stream import pinning
from lowvram_db.memory.stream.made_up import MadeUpTime
from lowvram_db.memory.stream.schedule import Use, least_room, planned
from lowvram_db.optim.placement import state_bytes
from lowvram_db.plan import predict
from lowvram_db.train import checkpoint
from lowvram_db.train.strategy import Strategy
from lowvram_db.train.streaming import moving

RESIDENT, HALF, ALL = (Strategy(5, 5, streamed=eighths) for eighths in (0, 4, 8))
SOME, WEIGHTS = (Strategy(5, 5, streamed=8, weights=eighths) for eighths in (3, 8))
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(autouse=True)
def delays(delayed):
    delayed(0)


@pytest.fixture
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    write_sdxl(folder)
    return folder


def exact(trainer):
    """All that is trained, all of the state, and the average."""
    with trainer.optimizer.at_rest():
        tensors = {name: trainer.optimizer.kept(p).clone() for name, p in trainer.trained.items()}
    for place, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"{place}/{k}": v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    return tensors | (trainer.average.weights if trainer.average else {})


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


SECTIONS = {
    "text encoder, residuals, average": (
        False,
        {
            "text_encoder": {"train": True},
            "precision": {"compute": "bf16", "weights": "bf16+residual"},
            "train": {"ema": 0.9},
        },
    ),
    "SDXL, its text encoders, gathered batches": (True, {"text_encoder": {"train": True}, "train": {"accumulate": 2}}),
    "fp16, clipped": (False, {"precision": {"compute": "fp16"}, "train": {"max_norm": 0.1}}),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_streamed_in_part_in_whole_and_not_at_all_are_the_same(
    make_config, make_trainer, sdxl, tmp_path, name, order_of
):
    """Each step in another way, with a checkpoint in the middle that is taken up in yet another one."""
    is_sdxl, sections = SECTIONS[name]
    model = {"model": {"name": str(sdxl)}} if is_sdxl else {}
    config = make_config(**{"precision": {"compute": "bf16"}, **model, **sections})
    straight, changing, resumed = (make_trainer(config, order=order_of(config)) for _ in range(3))
    for number, way in enumerate((HALF, WEIGHTS, RESIDENT, SOME, ALL, WEIGHTS)):
        straight.train_step()
        changing.use(way)
        changing.train_step()
        if number == 1:
            checkpoint.save(tmp_path / "step-000002", changing.contents())
            resumed.use(WEIGHTS)
            resumed.restore(tmp_path / "step-000002")
        elif number > 1:
            resumed.train_step()
    wanted = exact(straight)
    for trainer in (changing, resumed):
        assert_same(exact(trainer), wanted)
        trainer.finish()
    straight.finish()
    for trainer in (changing, resumed):
        assert_same(dict(trainer.trained), dict(straight.trained))


@pytest.mark.parametrize(
    "where", [pytest.param("conv_out.weight", marks=pytest.mark.slow), "mid_block.resnets.0.conv1.weight"]
)
@pytest.mark.parametrize(
    ("smaller", "larger", "words"),
    [
        (ALL, RESIDENT, "the state in RAM"),
        (WEIGHTS, ALL, "weights and state in RAM"),
        (WEIGHTS, SOME, "weights and state in RAM"),
    ],
)
def test_out_of_memory_moves_more_into_ram_and_loses_no_step(
    make_config, make_trainer, order_of, where, smaller, larger, words, capfd
):
    """From a larger way, in backward: at its beginning, and halfway; both as where it was never larger."""
    config = make_config(precision={"compute": "bf16"})
    order = order_of(config)

    def trained(way):
        trainer, failed = make_trainer(config, order=order), []

        def fail(_):
            if trainer.step == 1 and not failed:
                failed.append(True)
                raise torch.OutOfMemoryError(FULL)

        trainer.use(way)
        if way == smaller:
            trainer._ladder = [way, smaller]
        trainer.denoiser.get_parameter(where).register_hook(fail)
        for _ in range(3):
            trainer.train_step()
        assert failed and trainer.strategy == smaller
        return trainer

    assert_same(exact(trained(larger)), exact(trained(smaller)))
    said = capfd.readouterr().err
    assert f"Repeated, and on from here, with checkpointing everywhere, {words}" in said


def test_the_ladder_goes_on_into_ram_where_it_is_adam8s_state_of_whole_networks(make_config, make_trainer, order_of):
    for sections, last in [
        ({}, WEIGHTS),
        ({"train": {"gradient_checkpointing": False}}, Strategy(0, 5, streamed=8, weights=8)),
        ({"precision": {"compute": "bf16", "weights": "fp32"}}, ALL),
        ({"optimizer": {"name": "adafactor"}}, RESIDENT),
        ({"optimizer": {"name": "adamw"}}, Strategy(5, 5, parts=2)),
        ({"method": {"name": "lora"}, "optimizer": {"name": "adam8"}}, RESIDENT),
    ]:
        config = make_config(**sections)
        trainer = make_trainer(config, order=order_of(config, last.resident) if last.weights else ())
        assert trainer._ladder[-1] == last
        assert not trainer.strategy.streamed, "nothing is known of the memory"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 8))
def test_of_the_weights_so_many_eighths_are_lent_and_the_largest_stay(sizes, eighths):
    layers = {nn.Parameter(torch.empty(size, 4096)): nn.Module() for size in sizes}
    events = [(p, is_read) for is_read in (True, True, False) for p in layers]
    lent = moving(Strategy(1, 1, streamed=8, weights=eighths), events, layers, "bf16").weights
    staying = [len(p) for p in layers if p not in lent]
    assert sum(staying) * 8 <= sum(sizes) * (8 - eighths)
    assert all((sum(staying) + len(p)) * 8 > sum(sizes) * (8 - eighths) for p in lent), "not one more could stay"
    if max(sizes) * 8 <= sum(sizes) * (8 - eighths):
        assert max(sizes) == max(staying)


def test_weights_stay_where_nobody_knows_when_they_are_read(make_config, make_trainer, order_of):
    """As after a plan that had nothing recompute: its order has each weight read once."""
    config = make_config()
    for order in ((), order_of(config, Strategy(0, 5))):
        assert make_trainer(config, order=order)._ladder[-1] == ALL


def test_the_least_room_lets_the_largest_state_come_while_another_is_stepped():
    sizes = [4096, 2**20, 2**20]
    room = least_room([Use(number, True) for number in range(3)], sizes)
    assert room == 2 * 2**20
    first, second = planned([Use(1, True), Use(2, True)], sizes, room)
    assert first.start != second.start


def test_ram_that_is_not_free_is_said_before_anything_is_moved(make_config, make_trainer, monkeypatch):
    trainer = make_trainer(make_config(precision={"compute": "bf16"}))
    large = [p for p in trainer.parameters if p.numel() >= 4096]
    wanted = sum(state_bytes(p.numel(), "bf16") for p in large)
    memory = pinning.psutil.virtual_memory()
    monkeypatch.setattr(pinning.psutil, "virtual_memory", lambda: memory._replace(available=wanted - 1))
    with pytest.raises(DoesNotFit, match=r"needs 0\.\d\d GiB of RAM .* are free; close other programs, or .* --vram"):
        trainer.use(ALL)
    trainer.use(HALF)
    trainer.train_step()


@pytest.mark.parametrize("way", [ALL, SOME, WEIGHTS], ids=str)
def test_what_a_plan_counts_on_the_card_is_what_the_lanes_do(make_config, make_trainer, miniature, way, order_of):
    config = make_config(precision={"compute": "bf16"})
    trainer = make_trainer(config, order=order_of(config))
    made: list[MadeUpTime] = []
    lanes = pinning.MadeUpTime
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinning, "MadeUpTime", lambda duration: made.append(lanes(duration)) or made[-1])
        trainer.use(way)
    trainer.train_step()
    with predict.rehearsal(config, open_blank(miniature)) as traced:
        on_the_card, traced_as_well = (traced.steps(one) for one in (RESIDENT, way))
        resident, streamed = on_the_card[1], traced.moved(way, on_the_card)[1]
    assert streamed.ram_bytes == traced_as_well[1].ram_bytes
    for kind in ("weights", "optimizer"):
        assert streamed.components[kind] == traced_as_well[1].components[kind]
    homes = [v for s in trainer.optimizer.state_dict()["state"].values() if "codes" in s for v in s.values()]
    weights = [trainer.optimizer.kept(p) for p in trainer.moving(way).weights]
    held = sum(-(-v.nbytes // 512) * 512 for v in [*homes, *weights] if isinstance(v, torch.Tensor))
    assert streamed.ram_bytes == held
    gone = sum(resident.components[kind] - streamed.components[kind] for kind in ("weights", "optimizer"))
    assert gone == held - -(-made[0].card_bytes // 512) * 512
