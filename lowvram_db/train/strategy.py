"""How a training step trades time for memory without changing what is learned: the rungs of a ladder, fastest first."""

from dataclasses import dataclass

from lowvram_db.config import Config


@dataclass(frozen=True)
class Strategy:
    """One rung."""

    checkpointed: int  # how many of the denoiser's blocks recompute their activations (Architecture.checkpoint_blocks)
    blocks: int  # of how many
    parts: int = 1  # a batch goes through in so many parts, whose gradients add up

    def __str__(self) -> str:
        checkpointing = {0: "no checkpointing", self.blocks: "checkpointing everywhere"}.get(
            self.checkpointed, f"checkpointing {self.checkpointed} of {self.blocks} blocks"
        )
        return checkpointing + (f", batch in {self.parts} parts" if self.parts > 1 else "")


def ladder(config: Config, blocks: int) -> list[Strategy]:
    """The strategies that give what the user asked for; each takes more time than the one before, and less memory, save
    that a batch in parts can take more where its activations weigh nothing beside the gradients that wait.

    Only an optimizer that keeps all gradients until its step lets a batch be split: their sum is then the same. Adam8
    has stepped by then; gathering batches (train.accumulate) it takes the mean of squares for the square of the mean,
    which is another update.
    """
    wanted = config.train.gradient_checkpointing
    counts = range(blocks + 1) if wanted is None else [blocks if wanted else 0]
    rungs = [Strategy(count, blocks) for count in counts]
    rows = config.train.batch * (2 if config.prior.enabled else 1)
    if not config.optimizer.kind.steps_in_backward:
        parts = [2**power for power in range(1, rows.bit_length()) if rows % 2**power == 0]
        rungs += [Strategy(rungs[-1].checkpointed, blocks, count) for count in parts]
    return rungs


def without_budget(rungs: list[Strategy]) -> Strategy:
    """What to do where nothing is known of the memory there is: save it, short of splitting batches."""
    return [rung for rung in rungs if rung.parts == 1][-1]
