"""Two training steps as torch's own tracker sees them, to hold the prediction against."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from lowvram_db.config import Config
from lowvram_db.families.blank import Blank
from lowvram_db.plan import predict
from lowvram_db.plan.inputs import blank_batch
from lowvram_db.plan.tracing import tracing
from lowvram_db.train.learner import Inputs
from lowvram_db.train.strategy import Strategy


def tracked_bytes(config: Config, family: Blank, strategy: Strategy) -> int:
    """The peak that MemTracker sees, without the allocator's rounding; it takes some 30 times as long as a Trace."""
    tracker = MemTracker()
    with tracing(config.autocasts, config.optimizer.name) as trace:
        learner: Any = predict.blank_learner(config, family, strategy, trace)
        batch, forward = blank_batch(config, family), learner.forward

        def forward_anew(inputs: Inputs, prompts: list[str], part: slice) -> tuple[Tensor, Tensor]:
            tracker.reset_mod_stats()  # it follows one call of a module, or says so
            return forward(inputs, prompts, part)

        learner.forward = forward_anew
        tracker.track_external(*learner.modules.values(), *predict.state(learner.optimizer), *batch.moments)
        with tracker:
            for _ in range(2):
                learner.update(learner.backward(batch).total)
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
