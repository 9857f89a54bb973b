"""What a trace is fed with, and what it says of a phase."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lowvram_db.config import Config
from lowvram_db.families.base import Moments
from lowvram_db.families.blank import Blank
from lowvram_db.framing import View
from lowvram_db.memory.overheads import CONTEXT, CUBLAS_WORKSPACES
from lowvram_db.memory.trace import TEMPORARY, Trace
from lowvram_db.plan.result import Phase
from lowvram_db.train.batches import Batch

CPU = torch.device("cpu")  # fake tensors of a GPU cannot go backward where torch has no CUDA


def blank_batch(config: Config, family: Blank) -> Batch:
    rows = config.train.batch * (2 if config.prior.enabled else 1)
    shape = latent_shape(config, family, rows)
    moments, views = Moments(torch.empty(shape), torch.empty(shape)), [view(config)] * rows
    return Batch(moments, views, [""] * rows, config.train.batch)


def view(config: Config) -> View:
    side = config.train.resolution
    return View.of((side, side), (side, side))


def latent_shape(config: Config, family: Blank, rows: int) -> tuple[int, int, int, int]:
    side = config.train.resolution // family.latent_side
    return rows, family.latent_channels, side, side


def timesteps(rows: int, batch_number: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


def tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def phase(name: str, trace: Trace, start: int = 0, flops: int = 0) -> Phase:
    """Of what was traced since `start`."""
    peak: Counter[str] = trace.peak(start)
    components = {kind: peak[kind] for kind in ("weights", "optimizer", "gradients")}
    components |= {
        "activations": peak[""],
        "workspace": peak[TEMPORARY] + CUBLAS_WORKSPACES,
        "context": CONTEXT,
    }
    return Phase(name, components, flops, ram_bytes=trace.in_ram)
