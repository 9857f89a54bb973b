"""A trainer whose state lives in RAM is, to the bit, one whose state does not; the way may change at any step."""

import random

import pytest
import torch

from lowvram_db.demo.miniature import write_sdxl
from lowvram_db.errors import DoesNotFit
from lowvram_db.families import open_blank
from lowvram_db.memory.stream import pinning
from lowvram_db.memory.stream.made_up import MadeUpTime
from lowvram_db.memory.stream.schedule import Use, planned
from lowvram_db.optim.placement import state_bytes
from lowvram_db.plan import predict
from lowvram_db.train import checkpoint, streaming
from lowvram_db.train.strategy import Strategy

RESIDENT, HALF, ALL = (Strategy(5, 5, streamed=eighths) for eighths in (0, 4, 8))
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(autouse=True)
def delays(monkeypatch):
    """Copies and computations take anything between nothing and very long."""
    generator = random.Random(0)

    def made_up(duration):
        return MadeUpTime(lambda lane, size: size * generator.choice([0.0, 0.1, 1.0, 20.0]) * generator.random())

    monkeypatch.setattr(pinning, "MadeUpTime", made_up)


@pytest.fixture
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    write_sdxl(folder)
    return folder


def exact(trainer):
    """All that is trained, all of the state, and the average."""
    tensors = {name: p.detach().clone() for name, p in trainer.trained.items()}
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
def test_streamed_in_part_in_whole_and_not_at_all_are_the_same(make_config, make_trainer, sdxl, tmp_path, name):
    """Each step in another way, with a checkpoint in the middle that is taken up in yet another one."""
    is_sdxl, sections = SECTIONS[name]
    model = {"model": {"name": str(sdxl)}} if is_sdxl else {}
    config = make_config(**{"precision": {"compute": "bf16"}, **model, **sections})
    straight, changing, resumed = (make_trainer(config) for _ in range(3))
    for number, way in enumerate((HALF, ALL, RESIDENT, ALL)):
        straight.train_step()
        changing.use(way)
        changing.train_step()
        if number == 1:
            checkpoint.save(tmp_path / "step-000002", changing.contents())
            resumed.use(HALF)
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


@pytest.mark.parametrize("where", ["conv_out.weight", "mid_block.resnets.0.conv1.weight"])
def test_out_of_memory_moves_state_into_ram_and_loses_no_step(make_config, make_trainer, where, capfd):
    """From the smallest way without streaming, in backward: at its beginning, and halfway; both as where it never
    streams, and where it always has."""

    def trained(way):
        trainer, failed = make_trainer(make_config(precision={"compute": "bf16"})), []

        def fail(_):
            if trainer.step == 1 and not failed:
                failed.append(True)
                raise torch.OutOfMemoryError(FULL)

        trainer.use(way)
        trainer._ladder = [way, HALF]
        trainer.denoiser.get_parameter(where).register_hook(fail)
        for _ in range(3):
            trainer.train_step()
        assert failed and trainer.strategy == HALF
        return trainer

    assert_same(exact(trained(RESIDENT)), exact(trained(ALL)))
    said = capfd.readouterr().err
    assert "Repeated, and on from here, with checkpointing everywhere, 4/8 of the state in RAM" in said


def test_the_ladder_goes_on_into_ram_where_it_is_adam8s_state_of_whole_networks(make_config, make_trainer):
    for sections, last in [
        ({}, ALL),
        ({"train": {"gradient_checkpointing": False}}, Strategy(0, 5, streamed=8)),
        ({"optimizer": {"name": "adafactor"}}, RESIDENT),
        ({"optimizer": {"name": "adamw"}}, Strategy(5, 5, parts=2)),
        ({"method": {"name": "lora"}, "optimizer": {"name": "adam8"}}, RESIDENT),
    ]:
        trainer = make_trainer(make_config(**sections))
        assert trainer._ladder[-1] == last
        assert not trainer.strategy.streamed, "nothing is known of the memory"


def test_the_least_room_lets_the_largest_state_come_while_another_is_stepped():
    sizes = [4096, 2**20, 2**20]
    room = streaming.room_for(sizes, 8)
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


@pytest.mark.parametrize("pinnable", [1.0, 0.6, 0.3, 0.0])
def test_as_much_ram_is_pinned_as_can_be(monkeypatch, capfd, pinnable):
    """Half as much in turn, where the system has refused; with threads for the stages where any is not."""
    total, asked = 64 * 2**20, []

    class Card(MadeUpTime):
        def __init__(self, device, staged):
            super().__init__(lambda lane, size: 0.0)
            self.staged, self.closed = staged, False
            asked.append(self)

        def home(self, size, pinned):
            if pinned and size > pinnable * total:
                raise MemoryError(f"{size} bytes cannot be pinned")
            return super().home(size, pinned)

        def close(self):
            self.closed = True

    monkeypatch.setattr(streaming, "Cuda", Card)
    ram, lanes = streaming._ram(total, torch.device("cuda"))
    homes = [ram.home(2**20) for _ in range(64)]
    pinned = sum(home.pinned for home in homes)
    assert pinned == 64 * next(share for share in (1, 1 / 2, 1 / 4, 0) if share <= pinnable)
    assert lanes is asked[-1] and lanes.staged == (pinned < 64)
    assert [card.closed for card in asked] == [True] * (len(asked) - 1) + [False]
    assert capfd.readouterr().err.count("cannot be pinned: what is not is copied once more") == len(asked) - 1


def test_what_a_plan_counts_on_the_card_is_what_the_lanes_do(make_config, make_trainer, miniature):
    config = make_config(precision={"compute": "bf16"})
    trainer = make_trainer(config)
    made: list[MadeUpTime] = []
    lanes = streaming.MadeUpTime
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "MadeUpTime", lambda duration: made.append(lanes(duration)) or made[-1])
        trainer.use(ALL)
    trainer.train_step()
    with predict.rehearsal(config, open_blank(miniature)) as traced:
        resident, streamed = (traced.steps(way)[1] for way in (RESIDENT, ALL))
    homes = [v for s in trainer.optimizer.state_dict()["state"].values() if "codes" in s for v in s.values()]
    held = sum(-(-v.nbytes // 512) * 512 for v in homes if isinstance(v, torch.Tensor))
    assert streamed.ram_bytes == held
    gone = resident.components["optimizer"] - streamed.components["optimizer"]
    assert gone == held - made[0].card_bytes
