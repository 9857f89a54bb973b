"""What holds on a CPU, with Triton's interpreter for its kernels, and on the GPU where there is one: the same tests."""

import itertools
from dataclasses import replace

import pytest
import torch

from lowvram_db.kernels import adam8, launch
from lowvram_db.optim.adam8 import Adam8
from lowvram_db.optim.layout import is_channels_last
from lowvram_db.train import checkpoint, learner
from lowvram_db.train.keeper import keeper_of
from lowvram_db.train.strategy import Strategy, ladder

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


def kernels_of(device):
    """Triton's run on a CPU only where all of them are interpreted."""
    return ["torch", "triton"] if device.type == "cuda" or launch.interpreted() else ["torch"]


@pytest.fixture
def trainer_on(make_config, make_trainer, order_of, device):
    def make(strategy=None, **sections):
        config = make_config(**{"precision": {"compute": "bf16"}, **sections})
        order = order_of(config) if strategy and strategy.weights else ()
        trainer = make_trainer(config, device, order=order)
        trainer.use(strategy or Strategy(0, 5))
        return trainer

    return make


def exact(trainer):
    """All that is trained: weights, and all of the optimizer's state."""
    keeper = keeper_of(trainer.optimizer)
    with keeper.at_rest():
        tensors = {name: keeper.kept(p).cpu().clone() for name, p in trainer.denoiser.named_parameters()}
    for place, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"{place}/{k}": v.cpu().clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    return tensors


def assert_same(one, other):
    first, second = exact(one), exact(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def weights_after(device, steps=3, attach=False, kernels="torch", weights="bf16", seed=0, twins=2):
    """Of `twins` tensors that begin alike, have the same gradients, and are stepped apart from each other."""
    generator = torch.Generator().manual_seed(1)
    start = 0.05 * torch.randn(64, 80, generator=generator)
    parameters = [torch.nn.Parameter(start.clone()) for _ in range(twins)]
    optimizer = Adam8(parameters, lr=2e-6, weights=weights, seed=seed, kernels=kernels, device=device)
    if attach:
        optimizer.attach()
    for _ in range(steps):
        gradient = torch.randn(64, 80, generator=generator).to(device)
        sum((p.float() * gradient).sum() for p in parameters).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in parameters], start


@pytest.mark.parametrize("weights", ["bf16", "bf16+residual", "fp16", "fp32"])
def test_inside_backward_or_asked_for_the_bits_are_the_same(device, weights):
    for kernels in kernels_of(device):
        asked, _ = weights_after(device, kernels=kernels, weights=weights)
        inside, _ = weights_after(device, kernels=kernels, weights=weights, attach=True)
        assert all(torch.equal(a, b) for a, b in zip(asked, inside, strict=True)), kernels


@pytest.mark.parametrize("weights", ["bf16", "fp16"])
def test_half_precision_moves_as_often_as_float32_moves_far(device, weights):
    """At DreamBooth's learning rate a step is far below a weight's last place: some weights move by all of it, at
    random, and the mean of all is the float32 step."""
    for kernels in kernels_of(device):
        (moved,), start = weights_after(device, weights=weights, kernels=kernels, twins=1)
        (whole,), _ = weights_after(device, weights="fp32", kernels=kernels, twins=1)
        step = whole.cpu() - start
        far = (moved.cpu().float() - start.to(HALVES[weights]).float()).flatten()
        assert 0 < (far != 0).float().mean() < 1
        recovered = (far @ step.flatten() / step.square().sum()).item()
        assert recovered == pytest.approx(1, abs=0.35), kernels


def test_rounding_bits_are_of_the_seed_and_of_each_tensor(device):
    for kernels in kernels_of(device):
        (first, second), _ = weights_after(device, kernels=kernels)
        (other, _), _ = weights_after(device, kernels=kernels, seed=1)
        assert not torch.equal(first, second), "tensors that are alike round alike"
        assert not torch.equal(first, other), "seeds round alike"


def test_the_configs_seed_reaches_every_rounding(trainer_on, monkeypatch):
    records, update = [], adam8.update_

    def noting(*arguments):
        records.append(arguments[7].tolist())
        update(*arguments)

    monkeypatch.setattr(adam8, "update_", noting)
    trainer = trainer_on(train={"seed": 7})
    trainer.train_step()
    trainer.train_step()
    first, second = records[: len(records) // 2], records[len(records) // 2 :]
    assert len(first) > 20
    assert {record[adam8.SEED] for record in records} == {7}
    assert [{record[adam8.STEP] for record in step} for step in (first, second)] == [{0}, {1}]
    assert len({record[adam8.TENSOR] for record in first}) == len(first)


def test_schedule_and_warm_up_reach_every_step(trainer_on):
    """Seen by how far float32 weights go."""
    rates = []
    for schedule, warmup in (("constant", 0), ("constant", 2), ("cosine", 0)):
        trainer = trainer_on(train={"schedule": schedule, "warmup": warmup, "steps": 4}, precision={"compute": "fp32"})
        weight, far = trainer.denoiser.conv_in.bias, []
        for _ in range(4):
            before = weight.detach().clone()
            trainer.train_step()
            far.append((weight.detach() - before).abs().max().item())
        rates.append(far)
    constant, warm, cosine = rates
    assert warm[0] == pytest.approx(constant[0] / 2, rel=0.02)
    assert cosine[0] == pytest.approx(constant[0], rel=0.02)
    assert cosine[3] < 0.5 * constant[3]


def test_checkpointing_changes_no_bit(trainer_on):
    trainers = [trainer_on(strategy=Strategy(count, 5)) for count in (0, 2, 5)]
    for trainer in trainers:
        for _ in range(2):
            trainer.train_step()
    for one, other in itertools.pairwise(trainers):
        assert_same(one, other)


@pytest.mark.parametrize("weights", ["bf16", "bf16+residual"])
def test_what_is_in_ram_changes_no_bit(trainer_on, weights):
    precision = {"compute": "bf16", "weights": weights}
    ways = [Strategy(5, 5, streamed=eighths) for eighths in (0, 3, 8)]
    lent = [replace(ways[-1], weights=eighths) for eighths in (3, 8)]
    trainers = [trainer_on(way, precision=precision) for way in (*ways, *lent)]
    for trainer in trainers:
        for _ in range(3):
            trainer.train_step()
    for one, other in itertools.pairwise(trainers):
        assert_same(one, other)


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_resumed_as_if_never_stopped(trainer_on, tmp_path, compute):
    straight, resumed = (trainer_on(precision={"compute": compute}) for _ in range(2))
    straight.train_step()
    checkpoint.save(tmp_path / "step-000001", straight.contents())
    resumed.restore(tmp_path / "step-000001")
    for trainer in (straight, resumed):
        trainer.train_step()
    assert_same(straight, resumed)
    assert straight.scaler.state_dict() == resumed.scaler.state_dict()


@pytest.mark.parametrize("optimizer", ["adam8", "adamw"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_checkpoint_goes_from_channels_last_to_contiguous_and_back(
    trainer_on, tmp_path, monkeypatch, optimizer, turned
):
    """The GPU's order, on any device; the first step after it is the one that would have come."""

    def laid_out(last):
        layout = torch.channels_last if last else torch.contiguous_format
        monkeypatch.setattr(learner, "lay_out", lambda network, device: network.to(memory_format=layout))
        trainer = trainer_on(optimizer={"name": optimizer}, precision={"compute": "fp32"})
        assert is_channels_last(trainer.denoiser.mid_block.resnets[0].conv1.weight) == last
        return trainer

    straight, resumed = laid_out(turned), laid_out(not turned)
    straight.train_step()
    checkpoint.save(tmp_path / "step-000001", straight.contents())
    resumed.restore(tmp_path / "step-000001")
    for (name, one), other in zip(straight.denoiser.named_parameters(), resumed.denoiser.parameters(), strict=True):
        assert torch.equal(one, other), name
    start = [p.detach().clone() for p in resumed.parameters]
    for trainer in (straight, resumed):
        trainer.train_step()
    pairs = list(zip(straight.parameters, resumed.parameters, start, strict=True))
    far = torch.stack([(one - before).norm() for one, _, before in pairs]).norm()
    apart = torch.stack([(one - other).norm() for one, other, _ in pairs]).norm()
    assert apart < 0.02 * far


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["adam8", "adamw"])
def test_out_of_memory_in_the_forward_pass_ends_as_the_smaller_way_from_the_start(trainer_on, optimizer, accumulate):
    """In the step's last batch: what was gathered before it stays, or is gathered again."""
    sections = {"optimizer": {"name": optimizer}, "train": {"accumulate": accumulate}}
    broken, smaller = trainer_on(**sections), trainer_on(strategy=Strategy(1, 5), **sections)
    failed = []

    def fail(*_):
        if not failed and broken.micro_batch == accumulate - 1:
            failed.append(True)
            raise torch.OutOfMemoryError(FULL)

    broken.denoiser.conv_out.register_forward_pre_hook(fail)
    for trainer in (broken, smaller):
        for _ in range(2):
            trainer.train_step()
    assert broken.strategy == ladder(broken.config, 5)[1] == smaller.strategy
    assert broken.batch_number == 2 * accumulate
    assert_same(broken, smaller)


def test_out_of_memory_in_backward_lets_every_weight_make_the_step_once(trainer_on):
    broken, failed = trainer_on(precision={"compute": "fp32"}), []  # in which nothing is too small to be seen

    def fail(_):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError(FULL)

    broken.denoiser.mid_block.resnets[0].conv1.weight.register_hook(fail)
    before = exact(broken)
    broken.train_step()
    assert failed and broken.strategy == Strategy(1, 5) and broken.optimizer.calls == 1
    lr = broken.config.train.lr
    for name, p in broken.denoiser.named_parameters():  # Adam's first step is one lr long, a second would be another
        assert 0 < (p.detach().cpu() - before[name]).abs().mean().item() < 1.2 * lr, name
