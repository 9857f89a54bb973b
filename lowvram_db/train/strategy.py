"""How a training step trades time for memory without changing what is learned: the rungs of a ladder, fastest first."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lowvram_db.config import Config

EIGHTHS = 8


@dataclass(frozen=True)
class Strategy:
    """One rung."""

    checkpointed: int  # how many of the denoiser's blocks recompute their activations (Architecture.checkpoint_blocks)
    blocks: int  # of how many
    parts: int = 1  # a batch goes through in so many parts, whose gradients add up
    streamed: int = 0  # eighths of the optimizer's state that live in RAM and pass through the card
    weights: int = 0  # eighths of the large layers' weights that do so too, where all of the state does

    @property
    def resident(self) -> "Strategy":
        """The same with all of it on the card."""
        return replace(self, streamed=0, weights=0)

    def __str__(self) -> str:
        checkpointing = {0: "no checkpointing", self.blocks: "checkpointing everywhere"}.get(
            self.checkpointed, f"checkpointing {self.checkpointed} of {self.blocks} blocks"
        )
        parts = f", batch in {self.parts} parts" if self.parts > 1 else ""
        share = "" if self.streamed == EIGHTHS else f"{self.streamed}/{EIGHTHS} of "
        some = f"state and {self.weights}/{EIGHTHS} of weights"
        moved = {0: f"{share}the state", EIGHTHS: "weights and state"}.get(self.weights, some)
        return checkpointing + parts + (f", {moved} in RAM" if self.streamed else "")


class Event(NamedTuple):
    """Of a step: a layer reads a weight in a forward pass, or else the weight's gradient is complete."""

    place: int  # of the weight among what is trained
    reads: bool


def ladder(config: Config, blocks: int) -> list[Strategy]:
    """The strategies that give what the user asked for; each takes more time than the one before, and less memory, save
    that a batch in parts can take more where its activations weigh nothing beside the gradients that wait.

    Only an optimizer that keeps all gradients until its step lets a batch be split: their sum is then the same. Adam8
    has stepped by then; gathering batches (train.accumulate) it takes the mean of squares for the square of the mean,
    which is another update.

    State in RAM comes last, for what it costs depends on a link that nobody has asked; a LoRA's is not worth the way.
    """
    wanted = config.train.gradient_checkpointing
    counts = range(blocks + 1) if wanted is None else [blocks if wanted else 0]
    rungs = [Strategy(count, blocks) for count in counts]
    rows = config.train.batch * (2 if config.prior.enabled else 1)
    if not config.optimizer.kind.steps_in_backward:
        parts = [2**power for power in range(1, rows.bit_length()) if rows % 2**power == 0]
        rungs += [Strategy(rungs[-1].checkpointed, blocks, count) for count in parts]
    if config.optimizer.kind.streams and config.method.name == "full":
        rungs += [replace(rungs[-1], streamed=eighths) for eighths in range(1, EIGHTHS + 1)]
        if not config.autocasts:  # which a layer that asks for its weight would have to do for itself, twice
            rungs += [replace(rungs[-1], weights=eighths) for eighths in range(1, EIGHTHS + 1)]
    return rungs


def tells_of(order: Sequence[Event], strategy: Strategy) -> bool:
    """Whether it is the order of a step that recomputes as this strategy does, where weights are read."""
    reads = Counter(event.place for event in order if event.reads)
    return bool(reads) and (max(reads.values()) > 1) == (strategy.checkpointed > 0)


def without_budget(rungs: list[Strategy]) -> Strategy:
    """What to do where nothing is known of the memory there is: save it, without splitting batches or streaming."""
    return [rung for rung in rungs if rung.parts == 1 and not rung.streamed][-1]
