"""Predict each phase of training by a trace of the code that will run, on tensors that are not there.

The training step is train/learner.py's own: the same networks, checkpointing, optimizer, hooks and loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lowvram_db.config import Config
from lowvram_db.families.blank import Blank
from lowvram_db.memory.device import DTYPES
from lowvram_db.memory.overheads import CONTEXT, CUBLAS_WORKSPACES, RAM_WITH_CUDA
from lowvram_db.memory.stream.schedule import whole_granules
from lowvram_db.memory.trace import OverLimit, Trace
from lowvram_db.optim.kinds import StepsInBackward
from lowvram_db.optim.storage import SMALLEST
from lowvram_db.plan.beside import decode, denoise, guided, in_tiles
from lowvram_db.plan.inputs import CPU, blank_batch, tensors, timesteps
from lowvram_db.plan.inputs import phase as phase_of
from lowvram_db.plan.result import Phase
from lowvram_db.plan.tracing import tracing
from lowvram_db.train.batches import Batch
from lowvram_db.train.learner import Learner, Surroundings
from lowvram_db.train.strategy import Event, Strategy
from lowvram_db.train.streaming import Moving
from lowvram_db.train.trained import load_networks, steps_of


def training(config: Config, family: Blank, strategy: Strategy, limit: int | None = None) -> list[Phase]:
    """First step, steady step, sampling one picture at a time and saving, under one strategy. Raises OverLimit as soon
    as a step needs more."""
    with rehearsal(config, family) as traced:
        steps = traced.moved(strategy, traced.steps(strategy.resident, None if strategy.streamed else limit))
        sampling = [traced.sampling(1, strategy, limit)] if config.sample.every else []
        if limit is not None and (most := max(phase.peak_bytes for phase in (*steps, *sampling))) > limit:
            raise OverLimit(most)
        traced.use(strategy)
        return [*steps, *sampling, traced.saving()]


@contextmanager
def rehearsal(config: Config, family: Blank, step: int = 0) -> Iterator["Rehearsal"]:
    """Training of what a step trains, traced under one strategy after the other."""
    with tracing(config.autocasts, config.optimizer.name, twin=config.kernels == "torch") as trace:
        yield Rehearsal(config, family, trace, step)


class Rehearsal:
    """One learner for all strategies: most of the time a trace takes is spent on making it."""

    def __init__(self, config: Config, family: Blank, trace: Trace, step: int):
        self._config, self._family, self._trace = config, family, trace
        self._names = steps_of(config, step)
        self._learner = blank_learner(config, family, Strategy(0, family.checkpoint_steps), trace, step)
        self._batch = blank_batch(config, family)
        self._began = 0  # the step that is traced, in operations done
        self._events: list[tuple[Event, int]] = []  # of its first batch, in operations since it began
        self._done: set[int] = set()  # whose gradients have come in it
        self._seen: dict[Strategy, list[tuple[Event, int]]] = {}  # of steps that were traced to their end
        self._drawn: dict[
            tuple[int, int], Phase | None
        ] = {}  # on the way, by pictures at once and tilings, see tiles.py
        for place, parameter in enumerate(self._learner.parameters):
            parameter.register_hook(partial(self._note, Event(place, reads=False)))
        places = {parameter: place for place, parameter in enumerate(self._learner.parameters)}
        for weight, layer in self._learner.lendable.items():
            layer.register_forward_pre_hook(partial(self._note, Event(places[weight], reads=True)))
        # Of the average of what is trained, in float32 and in the computer's memory.
        self.average_bytes = 4 * sum(p.numel() for p in self._learner.parameters) if config.train.ema else 0

    def steps(self, strategy: Strategy, limit: int | None = None) -> list[Phase]:
        """First and steady step, as if there had been none before. Raises OverLimit."""
        trace, learner = self._trace, self._learner
        self.use(strategy)
        self._begin_anew()
        held, trace.limit = trace.live, _inside(limit)
        try:
            first = steady = _step(learner, self._batch, trace, self._names[0])
            if trace.live > held:  # else the first has left nothing behind, and all are like it
                steady = _step(learner, self._batch, trace, self._names[1])
        except OverLimit:
            trace.limit = None
            self._begin_anew()  # half a backward leaves gradients
            raise
        trace.limit = None
        self._seen[strategy.resident] = self._events.copy()
        return [first, replace(steady, name=self._names[1])]

    def moved(self, strategy: Strategy, resident: list[Phase]) -> list[Phase]:
        """As steps(), without a trace: from the phases of the same strategy with all of it on the card. What moves from
        there to RAM, and the room it passes through, count alike at every moment: the worst stays the worst."""
        what = self.moving(strategy)
        if not what.states:
            return resident
        states = len(what.states)
        room = whole_granules(what.room) - sum(what.sizes[:states])
        weights = sum(map(whole_granules, what.sizes[states:]))
        return [
            replace(phase.with_more("optimizer", room).with_more("weights", -weights), ram_bytes=what.ram_bytes)
            for phase in resident
        ]

    def use(self, strategy: Strategy) -> None:
        """For what is traced from now on."""
        if strategy.streamed:
            self._learner.order = self._order_of(strategy)
        self._learner.use(strategy)
        self._trace.label("optimizer", state(self._learner.optimizer))

    def order(self) -> list[Event]:
        """As a learner takes it: of the step with most recomputing that was traced to its end. That of gradients is the
        same in all."""
        most = max(self._seen, key=lambda strategy: strategy.checkpointed, default=self._learner.strategy)
        return self._order_of(most)

    def moving(self, strategy: Strategy) -> Moving:
        """What a strategy moves."""
        self._learner.order = self._order_of(strategy)
        return self._learner.moving(strategy)

    def _order_of(self, strategy: Strategy) -> list[Event]:
        resident = strategy.resident
        if resident not in self._seen:
            self._begin_anew()
            self._learner.use(resident)
            self._learner.backward(self._batch)
            self._seen[resident] = self._events.copy()
        return [event for event, _ in self._seen[resident]]

    def done(self, what: Moving) -> list[int]:
        """Floating point operations that a step has done at each event of what is moved. A step of that strategy, with
        all on the card, has been traced."""
        large = [p.numel() >= SMALLEST for p in self._learner.parameters]
        done = [operations for event, operations in self._seen[what.strategy.resident] if large[event.place]]
        return [done[place] for place in what.places if place < len(done)]

    def _note(self, event: Event, *_: object) -> None:
        if event.place not in self._done:  # else it is of a second batch, which is as the first
            self._events.append((event, self._trace.flops - self._began))
            if not event.reads:
                self._done.add(event.place)

    def sampling(self, pictures: int, strategy: Strategy, limit: int | None = None) -> Phase:
        """So many pictures at once, on the way, decoded in the largest tiles that fit."""

        def drawn(tilings: int) -> Phase | None:
            if (pictures, tilings) not in self._drawn:
                self.use(strategy.resident)
                self._drawn[pictures, tilings] = self._draw(pictures, tilings)
            resident = self._drawn[pictures, tilings]
            return resident and self.moved(strategy, [resident])[0]

        return in_tiles(drawn, limit)

    def _draw(self, pictures: int, tilings: int) -> Phase | None:
        learner, start, rows = self._learner, self._trace.mark(), guided(pictures, max(self._config.sample.guidance))
        with torch.no_grad():
            with learner.autocast():
                denoise(self._config, self._family, learner.denoiser, rows, learner.activations)
            dtype = torch.float32 if learner.dtype == torch.float16 else learner.dtype  # where it overflows
            there_are = decode(self._config, self._family, self._trace, dtype, tilings)
        return phase_of("sampling on the way", self._trace, start) if there_are else None

    def saving(self) -> Phase:
        """Nothing can follow it."""
        return _saving(self._learner, self._trace)

    def _begin_anew(self) -> None:
        self._events.clear()
        self._done.clear()
        self._began = self._trace.flops
        optimizer = self._learner.optimizer
        if isinstance(optimizer, StepsInBackward):
            optimizer.break_off()
            optimizer.step()
        else:
            optimizer.zero_grad(set_to_none=True)


def host_memory(training: list[Phase], others: list[Phase], average: int, samples: bool) -> tuple[int, int]:
    """Bytes of RAM that a run on a GPU takes, with and without a checkpoint's copy. The networks of a phase pass
    through it on their way to the card, the trained ones as they are stored there, or stay while they are read from
    there. What of training lives there and passes through the card is there until that ends; what of it was loaded
    goes into it, weight by weight.

    average: bytes of the average of what is trained, which is there for as long as that. samples: whether it is sampled
    on the way, for which the weights wait beside it.
    """
    weights = max(phase.components["weights"] for phase in training)
    streamed = max(phase.ram_bytes for phase in training)
    saved = max(phase.components["weights"] + phase.components["optimizer"] for phase in training) + streamed
    read = max((phase.components["weights"] + phase.ram_bytes for phase in others), default=0)
    waiting = weights if average and samples else 0
    least = max(read, streamed + max(weights, average + waiting))
    return RAM_WITH_CUDA + max(least, streamed + average + saved + average + waiting), RAM_WITH_CUDA + least


def _step(learner: Learner, batch: Batch, trace: Trace, name: str) -> Phase:
    start, before = trace.mark(), trace.flops
    for micro_batch in range(min(2, learner.config.train.accumulate)):  # all that follow are as the second
        learner.micro_batch = micro_batch
        loss = learner.backward(batch)
    trace.label("gradients", [p.grad for p in learner.parameters if p.grad is not None])
    learner.update(loss.total)
    trace.label("optimizer", state(learner.optimizer))
    return phase_of(name, trace, start, flops=trace.flops - before)


def blank_learner(config: Config, family: Blank, strategy: Strategy, trace: Trace, step: int = 0) -> Learner:

    def imagined(size: int) -> Tensor:
        trace.label("optimizer", [room := torch.empty(size, dtype=torch.uint8)])
        return room

    surroundings = Surroundings(CPU, DTYPES[config.precision.compute], timesteps, family.cached_text, imagined)
    networks = load_networks(config, family, step)
    if config.optimizer.kind.keeps_layout:  # as memory.device.lay_out has them on a GPU; Module.to refuses fake tensors
        for weight in tensors(networks.values()):
            if weight.dim() == 4:
                weight.data = weight.data.to(memory_format=torch.channels_last)
    learner = Learner(config, family, networks, surroundings, strategy, kernels="torch")
    for parameter in learner.parameters:
        parameter.register_hook(lambda gradient: trace.label("gradients", [gradient]))
    trace.label("weights", tensors(learner.modules.values()))
    trace.label("optimizer", state(learner.optimizer))
    return learner


def _saving(learner: Learner, trace: Trace) -> Phase:
    """All goes to the disk tensor by tensor; weights that have residuals are float32 before, in the place of the
    optimizer's state."""
    start = trace.mark()
    if isinstance(learner.optimizer, StepsInBackward):
        learner.optimizer.finish()
    trace.label("weights", tensors(learner.modules.values()))
    return phase_of("saving", trace, start)


def state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    tensors = [value for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]
    return tensors + [value for value in vars(optimizer).values() if isinstance(value, Tensor)]


def _inside(limit: int | None) -> int | None:
    """What is left of a budget for what a trace sees."""
    return None if limit is None else limit - CONTEXT - CUBLAS_WORKSPACES
