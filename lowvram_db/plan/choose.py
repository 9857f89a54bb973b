"""Walk the ladder from the fastest strategy down to the first that fits."""

import json
import math
import multiprocessing
import signal
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from lowvram_db.config import Config
from lowvram_db.errors import UserError
from lowvram_db.families.blank import Blank
from lowvram_db.memory.arithmetic import deterministic
from lowvram_db.memory.device import emulation
from lowvram_db.memory.overheads import CONTEXT, CUBLAS_WORKSPACES, MARGIN
from lowvram_db.memory.trace import OverLimit
from lowvram_db.optim.kinds import KINDS
from lowvram_db.plan import beside, predict
from lowvram_db.plan.result import Phase, Plan, Rung
from lowvram_db.plan.waiting import ASSUMED, rates, waiting
from lowvram_db.train.strategy import Event, Strategy, ladder, without_budget
from lowvram_db.train.trained import stage_end


def choose(config: Config, family: Blank, budget: int | None, explain: bool = False) -> Plan:
    """The fastest plan that stays inside `budget` bytes with a margin of MARGIN; the smallest where none does, or where
    there is no budget. explain: trace every rung to its end, also those that are known not to fit."""
    check_resolution(config, family)
    limit = None if budget is None else int(budget / (1 + MARGIN))
    with deterministic(config.train.deterministic), _another_process() as at_once:
        others = at_once(_others, config, family, limit)
        training, rungs, on_the_way, average, order, by = _training(config, family, limit, explain)
        drawn, encoding, sampling, batch, at_the_end, streamed = others()
    phases = [*drawn, *encoding, *training, *sampling]
    fits = None if limit is None else all(phase.peak_bytes <= limit for phase in phases)
    chosen = next(rung.strategy for rung in rungs if rung.chosen)
    steps = [phase for phase in training if phase.flops]
    ram = predict.host_memory(steps, [*drawn, *encoding, *sampling], average, config.sample.every > 0)
    at_once = min(on_the_way, at_the_end)
    plan = Plan(fits, budget, chosen, batch, at_once, phases, rungs, *ram, average, config.optimizer.name, order, by)
    plan.drawn_streamed = streamed
    if not config.optimizer.kind.streams:
        plan.resident = f"{config.optimizer.name} keeps its state on the card; only adam8's can live in RAM"
    if fits is False:
        plan.advice = list(_advice(config, family, budget))
    if problem := emulation(config.precision.compute, torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        plan.emulation = f"{config.precision.compute}: {problem}"
    return plan


def check_resolution(config: Config, family: Blank) -> None:
    """Raises UserError where the UNet cannot halve the latents as often as it wants to."""
    side = family.side_multiple
    if config.train.resolution < side:
        raise UserError(f"train.resolution: {config.train.resolution} is less than {side}, this model's least")


def _training(
    config: Config, family: Blank, limit: int | None, explain: bool
) -> tuple[list[Phase], list[Rung], int, int, list[Event], str]:
    """The phases of the chosen rung, all rungs looked at, how many pictures are made at once on the way, the bytes of
    the weights' average, the order of gradients, and by which rates a streamed rung waits. A rung has to have room for
    a picture on the way, too."""
    strategies = ladder(config, family.checkpoint_steps)
    most = max(strategy.checkpointed for strategy in strategies)
    rungs: dict[Strategy, Rung] = {}
    steps: dict[Strategy, list[Phase]] = {}

    def look(strategy: Strategy, within: int | None) -> None:
        if strategy in rungs:
            return
        if strategy.streamed:
            look(strategy.resident, None)
            phases = traced.moved(strategy, steps[strategy.resident])
            rungs[strategy], steps[strategy] = _rung(strategy, phases), phases
        else:
            rungs[strategy], steps[strategy] = _look(traced, strategy, within)
        if config.sample.every and rungs[strategy].traced_to_the_end:
            drawn = traced.sampling(1, strategy, limit)
            rungs[strategy].peak_bytes = max(rungs[strategy].peak_bytes, drawn.peak_bytes)

    def fits(strategy: Strategy) -> bool:
        # The last ones to the end: should none fit, the smallest of them is the answer.
        look(strategy, None if strategy.checkpointed == most else limit)
        return limit is not None and rungs[strategy].traced_to_the_end and rungs[strategy].peak_bytes <= limit

    with predict.rehearsal(config, family) as traced:
        if explain:
            for strategy in strategies:
                look(strategy, None)
        elif limit is None:
            fits(without_budget(strategies))
        elif not fits(strategies[0]):
            # Bisection: whether the rung halfway fits tells on which side of it to look on. It ends at a rung that was
            # seen to fit, and no faster one that was looked at does. As a rule more checkpointing takes less memory and
            # then it is the fastest of all that fit. A step can take some KiB more, for the inputs that a checkpointed
            # block keeps until its turn; then a faster one may have been missed by as little.
            whole = [strategy for strategy in strategies if strategy.parts == 1]
            if bisect_left(whole, True, lo=1, key=fits) == len(whole):
                any(fits(strategy) for strategy in strategies[len(whole) :])
        seen = [rungs[strategy] for strategy in strategies if strategy in rungs]
        chosen = _choice(seen, limit)
        chosen.chosen = True
        streamed = [rung for rung in seen if rung.strategy.streamed]
        by = rates(limit) if streamed else ASSUMED
        for rung in streamed:
            what = traced.moving(rung.strategy)
            rung.carried_up, rung.carried_down = what.carried
            rung.waits = waiting(what, traced.done(what), by)
        order = traced.order() if config.optimizer.kind.streams else []
        phases, pictures = steps[chosen.strategy], config.sample.pictures_a_row
        if config.sample.every:
            sampling, pictures = _as_many(pictures, lambda count: traced.sampling(count, chosen.strategy, limit), limit)
            phases = [*phases, sampling]
        traced.use(chosen.strategy)
        phases, average = [*phases, traced.saving()], traced.average_bytes
    later = _later_steps(config, family, chosen.strategy)
    return [*phases[:2], *later, *phases[2:]], _relative(seen), pictures, average, order, str(by) if streamed else ""


def _later_steps(config: Config, family: Blank, strategy: Strategy) -> list[Phase]:
    """Those that train less than the first: the largest need is that of the first, and the way is the same."""
    step = stage_end(config, 0)
    if step == config.train.steps:
        return []
    with predict.rehearsal(config, family, step) as traced:
        return traced.moved(strategy, traced.steps(strategy.resident))


def _look(traced: predict.Rehearsal, strategy: Strategy, limit: int | None) -> tuple[Rung, list[Phase]]:
    """A rung and its phases; none where it takes more than `limit`, as far as it was followed then."""
    try:
        phases = traced.steps(strategy, limit)
    except OverLimit as over:
        reached = over.reached
    else:
        return _rung(strategy, phases), phases
    return Rung(strategy, reached + CONTEXT + CUBLAS_WORKSPACES, None), []  # outside the handler, which holds the trace


def _rung(strategy: Strategy, phases: list[Phase]) -> Rung:
    return Rung(strategy, max(phase.peak_bytes for phase in phases), float(phases[0].flops))


def _choice(rungs: list[Rung], limit: int | None) -> Rung:
    """The fastest that fits, else the smallest; without a limit what is done then."""
    if limit is None:
        strategy = without_budget([rung.strategy for rung in rungs])
        return next(rung for rung in rungs if rung.strategy == strategy)
    whole = [rung for rung in rungs if rung.traced_to_the_end]
    return next((rung for rung in whole if rung.peak_bytes <= limit), min(whole, key=lambda rung: rung.peak_bytes))


def _relative(rungs: list[Rung]) -> list[Rung]:
    """Costs in units of the cheapest that was traced to its end; recomputing makes the others dearer."""
    cheapest = min(rung.cost for rung in rungs if rung.cost)
    for rung in rungs:
        rung.cost = rung.cost / cheapest if rung.cost else None
    return rungs


def _others(
    config: Config, family: Blank, limit: int | None
) -> tuple[list[Phase], list[Phase], list[Phase], int, int, bool]:
    """The phases beside training; how many class images, and pictures of the result, are made at once; and whether by a
    denoiser that is streamed."""
    drawn, sampling, batch, pictures, streamed = _pictures(config, family, limit)
    return drawn, list(beside.encoding(config, family, limit)), sampling, batch, pictures, streamed


@contextmanager
def _another_process() -> Iterator[Callable[..., Callable[[], Any]]]:
    """Gives a function that calls another one, in a process of its own where forking is safe, and gives a function
    that waits for the result."""
    # Elsewhere a fresh process would import torch and diffusers first, which takes as long as the work.
    if sys.platform != "linux" or torch.cuda.is_initialized():
        yield lambda function, *args: partial(function, *args)
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), initializer=_end_at_ctrl_c) as pool:
        yield lambda function, *args: pool.submit(function, *args).result


def _end_at_ctrl_c() -> None:
    """At once and without a word: it reaches both processes, and one of them speaks."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _pictures(config: Config, family: Blank, limit: int | None) -> tuple[list[Phase], list[Phase], int, int, bool]:
    """Class images, where they are wanted, and sampling, two phases each; how many of each are made at once; and
    whether by a denoiser that is streamed: where not so few fit with it on the card."""
    with beside.drawing(config, family) as draw:
        for streamed in (False, True):
            denoise = partial(draw.denoising, streamed=streamed)
            drawn, sampled, batch, pictures = _denoised(config, denoise, limit)
            if limit is None or all(phase.peak_bytes <= limit for phase in (*drawn, sampled)):
                break
        decoded = draw.decoding("sampling", limit, streamed)
    decoded_too = [replace(decoded, name="class images, decoding") for _ in drawn]
    return [*drawn, *decoded_too], [sampled, decoded], batch, pictures, streamed


def _denoised(
    config: Config, denoise: Callable[[str, int, float], Phase], limit: int | None
) -> tuple[list[Phase], Phase, int, int]:
    """As many at once as fit, and at least one; class images exactly prior.batch where the user has set it."""
    batch, fixed = config.prior.batch, "batch" in config.prior.model_fields_set
    guidance = max(config.sample.guidance)
    sampled, pictures = _as_many(
        config.sample.pictures_a_row, lambda count: denoise("sampling", count, guidance), limit
    )
    if not config.prior.enabled:
        return [], sampled, batch, pictures
    drawn, batch = _as_many(
        batch,
        lambda count: denoise("class images", count, config.prior.guidance),
        None if fixed else limit,
    )
    return [drawn], sampled, batch, pictures


def _as_many(wanted: int, draw: Callable[[int], Phase], limit: int | None) -> tuple[Phase, int]:
    """A phase with as many pictures at once as fit into the limit, at most `wanted` and at least one."""
    while (phase := draw(wanted)).peak_bytes > (limit or math.inf) and wanted > 1:
        wanted //= 2
    return phase, wanted


_Change = dict[str, dict[str, object]]  # section -> key -> value
_SMALLER_SIDES = (1024, 768, 640, 512, 384, 256)


def _advice(config: Config, family: Blank, budget: int | None) -> Iterator[str]:
    """Changes of the config that have been traced and fit, each alone; where none does alone all of them together, with
    fewer pixels or without the optimizer's state."""
    changes = list(_smaller_ways(config))
    smaller: list[_Change] = [
        {"train": {"resolution": side}} for side in _SMALLER_SIDES if side < config.train.resolution
    ]
    alone = [change for change in (*changes, *smaller[:2]) if _fits(_changed(config, [change]), family, budget)]
    if alone:
        yield from (_words(config, change) for change in alone)
        return
    without_state: _Change = {"optimizer": {"name": "adafactor"}}
    last = [[without_state], [*changes, without_state]] if _could_do_without_state(config) else []
    for together in ([[*changes, side] for side in smaller], last):
        fitting = (change for change in together if _fits(_changed(config, change), family, budget))
        yield from (", ".join(_words(config, change) for change in first) for first in islice(fitting, 1))


def _could_do_without_state(config: Config) -> bool:
    """Whether adafactor, which keeps the class a little less, could train this."""
    lacks = KINDS["adafactor"].lacks
    return (
        config.optimizer.kind.stores_weights
        and config.optimizer.name != "adafactor"
        and not (
            {f"optimizer.{key}" for key in config.optimizer.model_fields_set} & set(lacks)
            or config.train.accumulate > 1
        )
    )


def _smaller_ways(config: Config) -> Iterator[_Change]:
    """Settings other than the resolution that take less memory than what is set."""
    compute = config.precision.compute
    if config.train.gradient_checkpointing is False:
        yield {"train": {"gradient_checkpointing": True}}
    if config.train.batch > 1:
        yield {"train": {"batch": 1}}
    if config.method.name == "lora":
        if compute == "fp32":
            yield {"precision": {"compute": "bf16"}}
        if config.method.base != "nf4" and config.method.init == "default":
            yield {"method": {"base": "nf4"}}
    elif not config.optimizer.kind.stores_weights:
        yield {"optimizer": {"name": "adam8"}, "precision": _all_in(config, compute)}
    elif config.weights in ("fp32", "bf16+residual"):
        yield {"precision": _all_in(config, "bf16" if compute == "fp32" else compute)}
    if config.text_encoder.train:
        yield {"text_encoder": {"train": False, "lr": None, "stop": None}}
    if config.prior.enabled and config.prior.batch > 1:
        yield {"prior": {"batch": 1}}


def _all_in(config: Config, precision: str) -> dict[str, object]:
    """Arithmetic and weights in one precision; weights that are not set follow by themselves."""
    return {"compute": precision, "weights": config.precision.weights and precision}


def _words(config: Config, change: _Change) -> str:
    """A change as it is written in the TOML file, without what is set so already."""
    now = config.model_dump()
    settings = [(section, key, value) for section, values in change.items() for key, value in values.items()]
    return " and ".join(
        f"{section}.{key} left out" if value is None else f"{section}.{key} = {json.dumps(value)}"
        for section, key, value in settings
        if now[section][key] != value
    )


def _changed(config: Config, changes: list[_Change]) -> Config:
    tree = config.model_dump(exclude_unset=True)
    for change in changes:
        for section, values in change.items():
            tree[section] = tree.get(section, {}) | values
    return Config.model_validate(tree)


def _fits(config: Config, family: Blank, budget: int | None) -> bool:
    assert budget is not None
    limit = int(budget / (1 + MARGIN))
    smallest = ladder(config, family.checkpoint_steps)[-1]
    try:
        predict.training(config, family, smallest, limit)
    except OverLimit:
        return False
    drawn, encoding, sampling, *_ = _others(config, family, limit)
    phases = [*drawn, *sampling, *encoding]
    return all(phase.peak_bytes <= limit for phase in phases)
