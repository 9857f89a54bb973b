"""Where does a training step's time go? `python bench/profile_step.py --model sd15 --resolution 512`

Runs our step (bench/recipes.py) under torch.profiler and appends a row a category to bench/results/profile_step.csv:
seconds and share of a step, calls a step, and for convolution, matrix products and attention the arithmetic and its
rate. Checkpointing's second forward counts as forward; where it cannot be told from backward they stand in one row.
`step_s` is the step under the profiler, `bare_s` one without it.

Every event falls into one category, and the shares add up to 100. On a GPU seconds are those of its kernels, and
`launches and idle` is what is left of the step. On a CPU they are the clock's, self time of the operations, which one
thread calls however many (--threads) work inside; `python and dispatch` is what is left: autograd, views, allocation,
the model's own Python. The optimizer is taken as a whole there, for its twin makes so many small calls that recording
them would cost more than they do. `processor_s` far below `step_s` means that other work held the core.

`reading the cache` is timed apart, and added: a step's rows, from pages that are in memory already.
"""

import argparse
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from adam8 import MODELS, timed
from machine import add_row, computed
from recipes import Ours, Work, everywhere
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from usage import settle

from lowvram_db.cache import Cached, Store
from lowvram_db.memory.device import pick_device
from lowvram_db.optim.adam8 import Adam8
from lowvram_db.plan import predict
from lowvram_db.plan.inputs import blank_batch
from lowvram_db.plan.tracing import tracing
from lowvram_db.quiet import quiet_libraries
from lowvram_db.train.strategy import Strategy

OPTIMIZER, NOISE, OTHER, READING = "optimizer", "noise and loss", "elementwise and copies", "reading the cache"
REST = {"cuda": "launches and idle", "cpu": "python and dispatch"}
_RANGE = "adam8's work"
# By an event's own name, the first that fits; "" is what has no work of its own. Kernels of ours by their Triton names.
_NAMES = {
    OPTIMIZER: rf"^{_RANGE}$|^_kernel$",
    NOISE: r"lowvram_db::|lowvram_db_noise_loss|^_noisy_kernel|^_loss_kernel",
    "": r"^(?!aten::|xformers)|^aten::(empty\w*|new_empty|view|view_as|_unsafe_view|reshape|as_strided|t|transpose"
    r"|permute|expand|slice|split|chunk|select|narrow|unbind|unsqueeze|squeeze|detach|alias|flatten|unflatten|result_type)$",
    "attention, backward": r"attention\w*_backward",
    "attention, forward": r"attention|_sdp_|^xformers",
    "convolution, backward": r"^aten::\w*conv\w*_backward",
    "convolution, forward": r"^aten::\w*conv",
    "matrix products": r"^aten::\w*(linear|matmul|mm)$|^aten::\w*(linear|addmm)_",
    "norms": r"(group|layer)_norm",
}
_WORK = [name for name in _NAMES if name]


def named(name: str) -> str | None:
    return next((category for category, pattern in _NAMES.items() if re.search(pattern, name)), None)


def category(event: Any) -> str:
    """Of a profiler's event: an operation inside another is part of that one's work, unless autograd stands between."""
    around = category(event.cpu_parent) if event.cpu_parent else ""
    if around in (OPTIMIZER, NOISE):
        return around
    own = named(event.name)
    if own is None or (own == "" and event.name.startswith("aten::") and around != OTHER):
        return around or (OTHER if own is None else "")
    return own


@contextmanager
def optimizer_marked(inside: bool) -> Iterator[None]:
    """Adam8's work is one event a call; with `inside` what it calls is recorded too."""

    def marked(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with record_function(_RANGE):
                torch._C._autograd._enable_record_function(inside)
                try:
                    return method(*arguments)
                finally:
                    torch._C._autograd._enable_record_function(True)

        return call

    with patch.multiple(Adam8, _on_gradient=marked(Adam8._on_gradient), step=marked(Adam8.step)):
        yield


def on_cpu(events: Iterable[Any]) -> tuple[Counter[str], Counter[str]]:
    """Microseconds and calls by category, without what has no work of its own. A call inside a call is not counted."""
    times, calls = Counter[str](), Counter[str]()
    for event in events:
        kind = category(event)
        times[kind] += event.self_cpu_time_total
        calls[kind] += not event.cpu_parent or category(event.cpu_parent) != kind
    del times[""], calls[""]
    return times, calls


def on_gpu(events: Iterable[Any]) -> tuple[Counter[str], Counter[str]]:
    """Microseconds and kernels by category. A kernel goes with the operation that launched it; what was launched
    outside of any, or copies for autograd, is elementwise and copies."""
    times, calls, total = Counter[str](), Counter[str](), 0
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            total += 0 if event.is_user_annotation else event.self_device_time_total
        for kernel in event.kernels:
            if kernel.name != _RANGE:
                own = named(kernel.name)
                kind = own if own in (OPTIMIZER, NOISE) else category(event) or OTHER
                times[kind] += kernel.duration
                calls[kind] += 1
    times[OTHER] += total - sum(times.values())
    return times, calls


def arithmetic(work: Work, strategy: Strategy) -> Counter[str]:
    """Floating point operations of a step by category, from a trace on tensors that are not there."""
    config, family = work.config(), work.family()
    with tracing() as trace, FlopCounterMode(display=False) as counter:
        for end in ("", "_backward"):  # the counter knows the GPU's names for attention, a trace meets the CPU's
            name = f"_scaled_dot_product_flash_attention{{}}{end}"
            gpu, cpu = (getattr(torch.ops.aten, name.format(place)) for place in ("", "_for_cpu"))
            counter.flop_registry[cpu] = flop_registry[gpu]
        learner = predict.blank_learner(config, family, strategy, trace)
        learner.backward(blank_batch(config, family))
    flops = Counter[str]()
    for operation, amount in counter.get_flop_counts()["Global"].items():
        flops[named(f"aten::{operation.__name__}") or OTHER] += amount
    return flops


def reading(work: Work) -> float:
    """Median seconds, of 200 times, for the latents and the conditioning of a step's rows."""
    family = work.family()
    moments, prompt = work.moments(family)._asdict(), f"{work.rows:064x}"
    rows = [f"{row:064x}" for row in range(work.rows)]
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder)) as store:
        for row, key in enumerate(rows):
            store.put(key, {name: tensor[row] for name, tensor in moments.items()})
        store.put(prompt, {name: tensor[0] for name, tensor in work.text(family).items()})
        cached = Cached(store, {}, {}, {"": prompt})
        return timed(lambda: (cached.moments(rows), cached.conditioning([""] * work.rows)), torch.device("cpu"), 200)


def clocked(ours: Ours, steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds and processor seconds of a step."""
    settle(device)
    began, worked = time.perf_counter(), time.process_time()
    for _ in range(steps):
        ours.step()
    settle(device)
    return (time.perf_counter() - began) / steps, (time.process_time() - worked) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help="sd15, sdxl, or a folder")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1, help="photos a step; as many class images beside them")
    parser.add_argument("--steps", type=int, default=1, help="under the profiler")
    parser.add_argument("--compute", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--checkpointed", type=int, help="blocks that recompute their activations; default all")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(given.threads)
    device = pick_device()
    work = Work(MODELS.get(given.model, given.model), given.resolution, given.batch, compute=given.compute)
    family = work.family()
    strategy = everywhere(family)
    if given.checkpointed is not None:
        strategy = Strategy(given.checkpointed, family.checkpoint_steps)
    flops, read = arithmetic(work, strategy), reading(work)
    on_device = device.type == "cuda"
    with optimizer_marked(inside=on_device):
        ours = Ours(work, device, strategy)
        ours.step()
        bare, _ = clocked(ours, 1, device)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_device else [])
        with profile(activities=activities) as profiler:
            whole, processor = clocked(ours, given.steps, device)
    times, calls = (on_gpu if on_device else on_cpu)(profiler.events())
    if not sum(times.values()):
        raise SystemExit(
            "error: the profiler saw no kernel; NVIDIA lets only root see them unless told otherwise (ERR_NVGPUCTRPERM)"
        )
    seconds = {kind: times[kind] / 1e6 / given.steps for kind in [*_WORK, OTHER]}
    seconds[REST[device.type]] = whole - sum(seconds.values())
    seconds[READING] = read
    for kind, own in sorted(seconds.items(), key=lambda item: -item[1]):
        row = {
            "model": work.model.rpartition("/")[2],
            "resolution": work.resolution,
            "batch": f"{work.batch} + {work.batch} prior",
            "compute": computed(work.compute, device),
            "strategy": strategy,
            "threads": "" if on_device else given.threads,
            "category": kind,
            "seconds": f"{own:.4g}",
            "share_percent": f"{100 * own / (whole + read):.2f}",
            "calls": calls[kind] // given.steps or "",
            "gflop": f"{flops[kind] / 1e9:.1f}" if flops[kind] else "",
            "gflop_s": f"{flops[kind] / own / 1e9:.1f}" if flops[kind] else "",
            "step_s": f"{whole:.4g}",
            "bare_s": f"{bare:.4g}",
            "processor_s": f"{processor:.4g}",
        }
        add_row("profile_step", row)
        print("  ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
