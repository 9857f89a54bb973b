"""What a plan says, as plain values that go to JSON and come back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lowvram_db.train.strategy import Event, Strategy

COMPONENTS = ("weights", "optimizer", "gradients", "activations", "workspace", "context")


@dataclass
class Phase:
    """What one part of a run needs at its worst moment."""

    name: str
    components: dict[str, int]  # bytes, by COMPONENTS
    flops: int = 0
    least: bool = False  # where more is free, it takes more
    ram_bytes: int = 0  # of the computer's memory, for what lives there and passes through the card
    measured_bytes: int | None = None  # of the run it was made for: the allocator's, or a CPU's whole process

    @property
    def peak_bytes(self) -> int:
        return sum(self.components.values())

    @property
    def allocated_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated would say."""
        return self.peak_bytes - self.components["context"]

    def with_more(self, kind: str, more: int) -> Phase:
        """Where so many bytes more, or less, of a component are there all the time."""
        return replace(self, components={**self.components, kind: self.components[kind] + more})


@dataclass
class Rung:
    """One strategy of the ladder and what was found out about it."""

    strategy: Strategy
    peak_bytes: int  # as far as it was traced
    cost: float | None  # arithmetic of a step, in units of one without checkpointing; None: not traced to its end
    chosen: bool = False
    carried_up: int = 0  # bytes from RAM to the card, in a step
    carried_down: int = 0  # and back
    waits: float = 0.0  # seconds that a step takes longer for it

    @property
    def traced_to_the_end(self) -> bool:
        return self.cost is not None


@dataclass
class Plan:
    """fits: None where there is no budget to compare with. advice: changes of which each alone would make it fit.
    emulation: of the precision, where training on the machine that makes the plan would compute in another one.
    drawn_streamed: whether what draws, from disk, has its denoiser's weights in RAM."""

    fits: bool | None
    budget_bytes: int | None
    strategy: Strategy
    prior_batch: int  # class images made at once
    sample_batch: int  # pictures of a sample grid made at once
    phases: list[Phase]
    rungs: list[Rung]
    ram_bytes: int = 0  # host memory of a run on a GPU, with a checkpoint's copy
    least_ram_bytes: int = 0  # of one that waits while a checkpoint is written
    average_bytes: int = 0  # of both, for the average of the weights
    optimizer: str = ""
    order: list[Event] = field(default_factory=list)  # of a step: see train/learner.py
    rates: str = ""  # by which rungs' waits were computed
    resident: str = ""  # why no rung has state in RAM
    advice: list[str] = field(default_factory=list)
    emulation: str = ""
    drawn_streamed: bool = False

    @property
    def peak(self) -> Phase:
        """The phase that sets the peak."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "peak_bytes": self.peak.peak_bytes,
            "peak_phase": self.peak.name,
            "strategy": {**asdict(self.strategy), "name": str(self.strategy)},
            "phases": [{**asdict(phase), "peak_bytes": phase.peak_bytes} for phase in self.phases],
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Plan:
        """The plan that to_json gave. Raises KeyError or TypeError for anything else."""
        phases = [Phase(**{k: v for k, v in phase.items() if k != "peak_bytes"}) for phase in tree["phases"]]
        rungs = [Rung(**{**rung, "strategy": Strategy(**rung["strategy"])}) for rung in tree["rungs"]]
        strategy = Strategy(**{key: value for key, value in tree["strategy"].items() if key != "name"})
        plain = (
            "fits",
            "budget_bytes",
            "prior_batch",
            "sample_batch",
            "ram_bytes",
            "least_ram_bytes",
            "average_bytes",
            "optimizer",
            "rates",
            "resident",
            "advice",
            "emulation",
            "drawn_streamed",
        )
        known = {key: tree[key] for key in plain}
        order = [Event(*event) for event in tree["order"]]
        return cls(order=order, strategy=strategy, phases=phases, rungs=rungs, **known)
