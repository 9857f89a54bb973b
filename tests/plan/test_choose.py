from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lowvram_db.config import Config, _apply
from lowvram_db.errors import UserError
from lowvram_db.families import open_blank
from lowvram_db.formats.known import known_configs
from lowvram_db.memory.overheads import CONTEXT, CUBLAS_WORKSPACES, MARGIN
from lowvram_db.memory.stream.schedule import arrivals
from lowvram_db.memory.trace import OverLimit
from lowvram_db.plan import beside, predict
from lowvram_db.plan.choose import _advice, _pictures, _training, choose
from lowvram_db.plan.result import Phase, Plan
from lowvram_db.plan.show import ram, show
from lowvram_db.plan.waiting import Rates
from lowvram_db.train.strategy import Strategy, ladder

SMALL = {"prior": {"batch": 1}, "train": {"resolution": 128, "batch": 4}}


def peaks(config, family):
    with predict.rehearsal(config, family) as traced:
        resident = {rung: traced.steps(rung) for rung in ladder(config, family.checkpoint_steps) if not rung.streamed}
        steps = [traced.moved(rung, resident[rung.resident]) for rung in ladder(config, family.checkpoint_steps)]
    return [max(phase.peak_bytes for phase in phases) for phases in steps]


def test_the_fastest_that_fits_is_taken(planned, blank):
    config = planned(**SMALL)
    needed = peaks(config, blank)
    assert needed == sorted(set(needed), reverse=True)
    for place in (0, 2, 5, 6, 13, 14, 21):
        just = int(needed[place] * (1 + MARGIN)) + 1
        plan = choose(config, blank, just)
        assert plan.strategy == ladder(config, 5)[place]
        assert plan.fits and plan.peak.peak_bytes * (1 + MARGIN) <= just


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_a_plan_is_for_gpus_and_tells_what_this_cpu_would_emulate(planned, blank, halves_are_native, compute, capsys):
    plans = []
    for native in (True, False):
        halves_are_native(native)
        plans.append(choose(planned(**SMALL, precision={"compute": compute}), blank, 2**33))
    able, unable = plans
    assert unable.emulation == f"{compute}: emulated on this CPU, up to 100 times slower; computing in fp32"
    assert Plan.from_json(unable.to_json()) == unable == replace(able, emulation=unable.emulation)
    for plan in plans:
        show(plan)
        assert (f"on this machine {compute}: emulated" in capsys.readouterr().out) == bool(plan.emulation)


class Peaks:
    """A rehearsal of strategies whose peaks are given, which notes what was looked at."""

    average_bytes = 0

    def __init__(self, peaks):
        self.peaks, self.looked_at = peaks, set()

    def steps(self, strategy, limit):
        self.looked_at.add(strategy)
        if limit is not None and self.peaks[strategy] > limit:
            raise OverLimit(self.peaks[strategy])
        return [Phase("first step", {"weights": self.peaks[strategy]}, flops=1)]

    def saving(self):
        return Phase("saving", {})

    def use(self, strategy):
        assert strategy in self.looked_at


@given(needed=st.lists(st.integers(1, 9), min_size=8, max_size=8), limit=st.integers(0, 9), falling=st.booleans())
@example(needed=[9, 9, 5, 6, 6, 4, 3, 2], limit=5, falling=False)  # as the trace of a miniature has been seen to do
def test_a_ladder_that_rises_here_and_there_still_ends_at_a_rung_that_fits(planned, blank, needed, limit, falling):
    config = planned(train={"batch": 2}, optimizer={"name": "bnb-adam8"})
    rungs = ladder(config, blank.checkpoint_steps)  # six of checkpointing, and two of batches in parts
    peaks = Peaks(dict(zip(rungs, sorted(needed, reverse=True) if falling else needed, strict=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "rehearsal", lambda config, family: nullcontext(peaks))
        chosen = next(rung for rung in _training(config, blank, limit, explain=False)[1] if rung.chosen)
    assert chosen.peak_bytes == peaks.peaks[chosen.strategy]
    fitting = [rung for rung in rungs if peaks.peaks[rung] <= limit]
    seen = [rung for rung in fitting if rung in peaks.looked_at]
    if seen:
        assert chosen.strategy == seen[0], "the fastest of those that were seen to fit"
    else:
        assert rungs[5] in peaks.looked_at and chosen.peak_bytes == min(peaks.peaks[rung] for rung in rungs[5:])
    if falling:
        assert seen[:1] == fitting[:1], "the fastest there is"


def test_what_does_not_fit_says_what_would(planned, blank):
    config = planned(prior={"batch": 1}, train={"resolution": 128, "batch": 16})
    plan = choose(config, blank, int(peaks(config, blank)[-1] * (1 + MARGIN)) - 2**20)
    assert plan.fits is False
    assert plan.strategy == ladder(config, 5)[-1], "the smallest"
    assert "train.batch = 1" in plan.advice
    hopeless = choose(config, blank, CONTEXT)
    assert hopeless.fits is False and hopeless.advice == []


def test_advice_that_is_followed_helps(planned, blank):
    fixed = {"resolution": 128, "batch": 4, "gradient_checkpointing": False}
    budget = int(peaks(planned(**SMALL), blank)[-1] * (1 + MARGIN)) + 2**20
    plan = choose(planned(prior={"batch": 1}, train=fixed), blank, budget)
    assert plan.fits is False
    assert plan.strategy.checkpointed == 0, "what the user fixed is not changed"
    assert "train.gradient_checkpointing = true" in plan.advice
    assert choose(planned(prior={"batch": 1}, train=fixed | {"gradient_checkpointing": True}), blank, budget).fits


@pytest.mark.parametrize(
    ("sections", "advice"),
    [
        ({"precision": {"compute": "fp32"}}, ['precision.compute = "bf16"']),
        ({"precision": {"weights": "bf16+residual"}}, ['precision.weights = "bf16"']),
        ({"precision": {"compute": "fp16", "weights": "fp32"}}, ['precision.weights = "fp16"']),
        (
            {"precision": {"compute": "fp32", "weights": "fp32"}},
            ['precision.compute = "bf16" and precision.weights = "bf16"'],
        ),
        ({"optimizer": {"name": "adamw"}}, ['optimizer.name = "adam8"']),
        (
            {"optimizer": {"name": "adamw"}, "precision": {"weights": "fp32"}},
            ['optimizer.name = "adam8" and precision.weights = "bf16"'],
        ),
        ({"optimizer": {"name": "bnb-adam8"}, "precision": {"compute": "fp32"}}, ['optimizer.name = "adam8"']),
        ({"train": {"gradient_checkpointing": True, "batch": 1}}, ['optimizer.name = "adafactor"']),
        ({"method": {"name": "lora"}}, ['method.base = "nf4"']),
        (
            {"method": {"name": "lora", "base": "nf4"}, "precision": {"compute": "fp32"}},
            ['precision.compute = "bf16"'],
        ),
        ({"method": {"name": "lora", "init": "pissa"}}, []),
        ({"optimizer": {"name": "adafactor"}}, []),
        ({"optimizer": {"beta1": 0.8}}, []),
        ({"train": {"accumulate": 2}}, []),
        (
            {"train": {"batch": 2}, "text_encoder": {"train": True}},
            ["train.batch = 1", "text_encoder.train = false"],
        ),
    ],
)
def test_advice_is_written_as_the_config_takes_it_and_names_nothing_that_is_so_already(
    planned, blank, sections, advice, monkeypatch
):
    sections = {**sections, "train": {"resolution": 128, **sections.get("train", {})}}
    sections["prior"] = {"batch": 1, **sections.get("prior", {})}
    config, tried = planned(**sections), []
    monkeypatch.setattr("lowvram_db.plan.choose._fits", lambda changed, *_: tried.append(changed) or True)
    assert list(_advice(config, blank, 2**30)) == advice
    for words, changed in zip(advice, tried, strict=True):
        tree = config.model_dump(exclude_unset=True)
        for setting in words.split(" and "):
            _apply(tree, setting)
        assert Config.model_validate(tree) == changed, "what was found to fit"


def test_without_a_budget_memory_is_saved_and_nothing_claimed(planned, blank):
    plan = choose(planned(train={"resolution": 64}), blank, None)
    assert (plan.fits, plan.budget_bytes, plan.strategy.checkpointed) == (None, None, 5)


def test_every_rung_is_explained(planned, blank):
    plan = choose(planned(**SMALL), blank, 2**40, explain=True)
    assert [rung.chosen for rung in plan.rungs] == [True] + (5 + 8 + 8) * [False]
    costs = [rung.cost for rung in plan.rungs]
    assert costs[0] == 1 and costs == sorted(costs) and 1.1 < costs[-1] < 4 / 3
    assert set(costs[5:]) == {costs[5]}, "to stream is no arithmetic"
    assert [rung.peak_bytes for rung in plan.rungs] == peaks(planned(**SMALL), blank)


def test_state_in_ram_takes_no_further_trace(planned, blank, monkeypatch):
    """A trace of a large network takes seconds, and eight rungs differ in where state is."""
    traced, steps = [], predict.Rehearsal.steps
    monkeypatch.setattr(
        predict.Rehearsal, "steps", lambda self, rung, *limit: traced.append(rung) or steps(self, rung, *limit)
    )
    monkeypatch.setattr("lowvram_db.plan.choose._advice", lambda *_: [])
    config = planned(train={"resolution": 64}, prior={"enabled": False}, text_encoder={"train": True, "stop": 9})
    plan = choose(config, blank, CONTEXT, explain=True)
    resident = [rung for rung in ladder(config, blank.checkpoint_steps) if not rung.streamed]
    assert plan.strategy.weights and traced == [*resident, resident[-1]]


def test_what_copies_cost_is_said_and_which_optimizers_have_none(planned, blank, capsys):
    show(choose(planned(**SMALL), blank, 2**40, explain=True), explain=True)
    streaming = capsys.readouterr().out
    assert "assumed: an RTX 4070 on PCIe 4.0 x16" in streaming and "keeps its state" not in streaming
    show(choose(planned(**SMALL, optimizer={"name": "bnb-adam8"}), blank, 2**40, explain=True), explain=True)
    resident = capsys.readouterr().out
    assert "bnb-adam8 keeps its state on the card; only adam8's can live in RAM" in resident
    assert "GB/s" not in resident and "state in RAM" not in resident


def test_what_copies_are_waited_for_is_said_of_each_rung(planned, blank, monkeypatch, capsys):
    """By hand: where arithmetic takes no time a step takes as long as its copies, of which two ways go on at once."""
    monkeypatch.setattr("lowvram_db.plan.choose.rates", lambda budget: Rates(1e18, 1e6, 1e6, "a slow link"))
    plan = choose(planned(**SMALL), blank, 2**40, explain=True)
    for rung in plan.rungs:
        assert rung.carried_up / 1e6 <= rung.waits <= 2.1 * rung.carried_up / 1e6
        assert (rung.carried_up > rung.carried_down) == bool(rung.strategy.weights)
        assert bool(rung.waits) == bool(rung.strategy.streamed)
    show(plan, explain=True)
    assert f"+ {1000 * plan.rungs[-1].waits:.0f} ms" in capsys.readouterr().out


def test_class_images_come_fewer_at_once_unless_the_user_says_how_many(planned, blank):
    with beside.drawing(planned(train={"resolution": 256}), blank) as draw:
        two, four = (draw.denoising("class images", count, 7.5).peak_bytes for count in (2, 4))
    budget = int((two + four) / 2 * (1 + MARGIN))
    assert choose(planned(train={"resolution": 256}), blank, budget).prior_batch == 2
    fixed = choose(planned(train={"resolution": 256}, prior={"batch": 4}), blank, budget)
    assert (fixed.prior_batch, fixed.fits) == (4, False)


@pytest.mark.parametrize(("gib", "streams"), [(8, False), (2.5, True)])
def test_pictures_of_sdxl_at_1024_px_fit(planned, gib, streams):
    """With its denoiser, of 4.8 GiB, on the card as long as that is large enough, and at the end in tiles."""
    name, limit = "stabilityai/stable-diffusion-xl-base-1.0", int(gib * 2**30 / (1 + MARGIN))
    config = planned(name, train={"resolution": 1024})
    drawn, sampling, batch, _, streamed = _pictures(config, open_blank(known_configs(name)), limit)
    assert batch >= 1 and [phase.name for phase in drawn] == ["class images, denoising", "class images, decoding"]
    assert streamed == streams and all(phase.peak_bytes <= limit for phase in (*drawn, *sampling))


@pytest.mark.parametrize("prior", [{"enabled": False}, {}, {"batch": 4}])
def test_pictures_come_by_weights_in_ram_where_not_one_fits_with_them_on_the_card(planned, blank, prior):
    """Or not as many as the user has said."""
    config = planned(prior=prior, train={"resolution": 64}, sample={"seeds": 4, "guidance": [7.5]})
    with beside.drawing(config, blank) as draw:
        resident = draw.denoising("", prior.get("batch", 1), 7.5).peak_bytes
    (*roomy, on_the_card), (drawn, sampling, *tight, streamed) = (
        _pictures(config, blank, limit) for limit in (resident, resident - 1)
    )
    assert (on_the_card, streamed) == (False, True)
    assert all(
        phase.ram_bytes > 0 and phase.peak_bytes < resident for phase in (*drawn, *sampling) if "den" in phase.name
    )
    assert all(phase.ram_bytes == 0 for phases in roomy[:2] for phase in phases)
    assert prior.get("batch", tight[0]) == tight[0]


def test_a_plan_says_by_which_weights_pictures_are_drawn(planned, blank, monkeypatch, capsys):
    config = planned(train={"resolution": 64})
    found = _pictures(config, blank, None)
    for streamed in (False, True):
        monkeypatch.setattr("lowvram_db.plan.choose._pictures", lambda *_, says=streamed: (*found[:-1], says))
        plan = choose(config, blank, None)
        assert plan.drawn_streamed == streamed and Plan.from_json(plan.to_json()) == plan
        show(plan)
        assert ("pictures drawn by weights in RAM" in capsys.readouterr().out) == streamed


def test_the_ram_of_weights_that_pictures_are_drawn_by_is_counted(planned):
    """They are the most that is there at once where what is trained is small."""
    drawn = Phase("sampling, denoising", {"weights": 2**28}, ram_bytes=5 * 2**30)
    training = Phase("steady step", {"weights": 2**30, "optimizer": 0})
    _, least = predict.host_memory([training], [drawn], 0, False)
    assert least == 3 * 2**30 + 5 * 2**30 + 2**28


@pytest.mark.parametrize("every", [0, 1])
def test_a_grids_pictures_come_fewer_at_once_where_they_would_not_fit(planned, blank, every):
    """A row of 16 seeds and two guidance scales: at the end, or on the way, where weights and the optimizer's state are
    there too."""
    config = planned(train={"resolution": 64}, prior={"enabled": False}, sample={"seeds": 16, "every": every})
    with predict.rehearsal(config, blank) if every else beside.drawing(config, blank) as traced:
        way = Strategy(0, 5)
        sixteen, all_ = (
            (traced.sampling(count, way) if every else traced.denoising("sampling", count, 11.0)).peak_bytes
            for count in (16, 32)
        )
    plan = choose(config, blank, int((sixteen + all_) / 2 * (1 + MARGIN)))
    assert (plan.sample_batch, plan.fits) == (16, True)
    assert choose(config, blank, int(all_ * (1 + MARGIN)) + 2**20).sample_batch == 32


def test_without_another_process_the_plan_is_the_same(planned, blank, monkeypatch):
    config = planned(**SMALL)
    beside = choose(config, blank, 2**40)
    monkeypatch.setattr("lowvram_db.plan.choose.ProcessPoolExecutor", None)
    monkeypatch.setattr("sys.platform", "darwin")
    assert choose(config, blank, 2**40) == beside


def test_phases_are_all_there_in_order(planned, blank):
    config = planned(train={"resolution": 64}, sample={"every": 1})
    assert [phase.name for phase in choose(config, blank, None).phases] == [
        "class images, denoising", "class images, decoding", "text encoding", "latent encoding",
        "first step", "steady step", "sampling on the way", "saving", "sampling, denoising", "sampling, decoding",
    ]  # fmt: skip
    config = planned(train={"resolution": 64}, text_encoder={"train": True, "stop": 9}, prior={"enabled": False})
    names = [phase.name for phase in choose(config, blank, None).phases]
    assert names == [
        "text encoding", "latent encoding", "first step", "steady step", "first step, frozen text",
        "steady step, frozen text", "saving", "sampling, denoising", "sampling, decoding",
    ]  # fmt: skip


def test_state_in_ram_is_counted_there_beside_whatever_is_loaded(planned, blank):
    """And once more in the copy of a checkpoint, as it is from the card."""
    config = planned(**SMALL)
    roomy, tight = (choose(config, blank, int(peaks(config, blank)[place] * (1 + MARGIN)) + 1) for place in (5, 13))
    streamed = next(phase.ram_bytes for phase in tight.phases if phase.name == "steady step")
    assert tight.strategy.streamed == 8 and streamed > 0
    assert tight.least_ram_bytes - roomy.least_ram_bytes == streamed
    passes = max(phase.components["optimizer"] for phase in tight.phases)
    kept = max(phase.components["optimizer"] for phase in roomy.phases)
    assert tight.ram_bytes - roomy.ram_bytes == 2 * streamed + passes - kept


def test_the_order_that_a_plan_gives_is_that_of_a_real_backward(planned, blank, family):
    """Whichever rungs its trace got through. The denoiser comes first, so the later stage's is in it."""
    text = {"train": True, "stop": 9}
    for budget in (2**40, CONTEXT):
        plan = choose(planned(**SMALL, text_encoder=text), blank, budget)
        denoiser, encoder = family.load_denoiser(), family.load_text_encoders()["text_encoder"]
        listened_to = family.trainable("text_encoder", encoder)
        parameters = [*denoiser.parameters(), *listened_to.values()]
        denoiser.enable_gradient_checkpointing()

        def backward(encoder=encoder, denoiser=denoiser):
            told = family.encode_prompts({"text_encoder": encoder}, ["a dog"])
            family.denoise(denoiser, torch.randn(1, 4, 8, 8), torch.tensor([1]), told).sum().backward()

        real = arrivals(parameters, backward)
        assert [parameters[event.place] for event in plan.order if not event.reads] == real
    assert choose(planned(**SMALL, optimizer={"name": "adamw"}), blank, 2**40).order == []


def test_host_memory_holds_what_a_checkpoint_copies_or_the_largest_network(planned, blank):
    plan = choose(planned(train={"resolution": 64}, optimizer={"name": "adamw"}), blank, None)
    weights = sum(p.numel() for p in blank.load_denoiser().parameters()) * 4
    base = 3 * 2**30
    assert plan.ram_bytes - base == pytest.approx(3 * weights, rel=0.05), "weights and two moments in float32"
    loaded = max(phase.components["weights"] for phase in plan.phases)
    assert plan.least_ram_bytes - base == loaded >= weights


def test_text_encoders_that_have_stopped_take_nothing_any_more(planned, blank):
    """Both stages are there; the first, which needs more, says what a run needs."""
    stops, to_the_end, never = (
        choose(planned(train={"resolution": 64}, prior={"enabled": False}, text_encoder=text), blank, None)
        for text in ({"train": True, "stop": 9}, {"train": True}, {})
    )
    of = [{phase.name: phase for phase in plan.phases} for plan in (stops, to_the_end, never)]
    for step in ("first step", "steady step"):
        assert of[0][step] == of[1][step]
        assert of[0][f"{step}, frozen text"] == replace(of[2][step], name=f"{step}, frozen text")
        assert of[1][step].peak_bytes > of[2][step].peak_bytes
    assert (stops.strategy, stops.ram_bytes) == (to_the_end.strategy, to_the_end.ram_bytes)


@pytest.mark.parametrize("every", [0, 1])
def test_an_average_takes_four_bytes_a_weight_of_ram_and_none_of_the_card(planned, blank, every):
    """And the weights beside it, where it is drawn on the way."""
    sections = {"text_encoder": {"train": True}, "prior": {"enabled": False}, "sample": {"every": every}}
    plain, averaged = (
        choose(planned(**sections, train={"resolution": 64, "ema": ema}, optimizer={"name": "adamw"}), blank, None)
        for ema in (None, 0.999)
    )
    networks = [blank.load_denoiser(), *blank.load_text_encoders().values()]
    weights = sum(p.numel() for network in networks for p in network.parameters()) * 4
    assert averaged.average_bytes == weights
    assert averaged.phases == plain.phases
    waits = 2 * weights if every else weights
    assert averaged.least_ram_bytes - 3 * 2**30 == pytest.approx(waits, rel=0.05)
    assert averaged.ram_bytes - plain.ram_bytes == pytest.approx(weights + waits, rel=0.05), "and once in the copy"
    assert f"; {weights / 2**30:.2f} GiB of that for the weights' average" in ram(averaged)
    assert "average" not in ram(plain)


def test_a_plan_survives_json(planned, blank):
    plan = choose(planned(**SMALL), blank, 2**40, explain=True)
    tree = plan.to_json()
    assert Plan.from_json(tree) == plan
    assert {"fits", "peak_bytes", "budget_bytes", "strategy", "phases"} <= tree.keys()
    assert all(sum(phase["components"].values()) == phase["peak_bytes"] for phase in tree["phases"])
    assert all(phase["components"]["context"] == CONTEXT for phase in tree["phases"])
    assert all(phase["components"]["workspace"] >= CUBLAS_WORKSPACES for phase in tree["phases"])


def test_a_picture_too_small_for_the_unet_is_refused(planned, blank):
    with pytest.raises(UserError, match=r"train\.resolution: 8 is less than 16"):
        choose(planned(train={"resolution": 8}), blank, None)


def test_a_strategy_has_room_for_a_picture_on_the_way_too(planned, blank):
    """In tiles before training gets slower, and by weights in RAM before nothing fits. Of fp16 it is decoded in
    float32, which takes more than a step of this one."""
    config = planned(
        train={"resolution": 128}, prior={"enabled": False}, sample={"every": 1}, precision={"compute": "fp16"}
    )
    rungs = ladder(config, blank.checkpoint_steps)
    with predict.rehearsal(config, blank) as traced:
        most = [max(phase.peak_bytes for phase in traced.steps(rung)) for rung in (rungs[-1].resident, rungs[-1])]
        whole, tiled = (traced.sampling(1, rungs[-1].resident, limit).peak_bytes for limit in (None, 0))
        least = traced.sampling(1, rungs[-1], 0).peak_bytes
    assert most[1] < least < most[0] < tiled < whole
    for limit in (least, most[0], tiled):
        plan = choose(config, blank, int(limit * (1 + MARGIN)) + 1)
        drawn = next(phase.peak_bytes for phase in plan.phases if phase.name == "sampling on the way")
        assert plan.fits and drawn <= limit
        assert bool(plan.strategy.streamed) == (limit < tiled)
