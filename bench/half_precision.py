"""What half precision costs on this CPU, and what the way around it costs where the CPU only emulates it.

    python bench/half_precision.py                                   # layers of Stable Diffusion 1.5, a dtype a row
    ONEDNN_MAX_CPU_ISA=AVX2 python bench/half_precision.py --step    # a CPU of AVX2 alone, and a whole step there
    ONEDNN_MAX_CPU_ISA=AVX2 python bench/half_precision.py --demo    # and a step of the demo, with two optimizers

`native` is what memory/arithmetic.py says; times_first are those of the first row of a kind, with which the others
take turns. A step is that of SD 1.5's true shape at 256 px, one photo and one class image, checkpointed everywhere,
once with bf16 weights and once with fp32 ones; the optimizer is left out. The demo's is bf16, as configs/demo.toml has
it. Processor time, for other work may run beside it.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from adam8 import MODELS
from machine import add_row, computed
from recipes import Ours, Work
from torch.nn import functional

from lowvram_db.config import load
from lowvram_db.kernels import adam8
from lowvram_db.memory.arithmetic import is_native
from lowvram_db.memory.device import DTYPES, pick_device

DEMO = Path(__file__).parents[1] / "configs" / "demo.toml"
_CPU = torch.device("cpu")
_LAYERS: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "3 x 3 convolution, 320 channels, 32 x 32": (functional.conv2d, (1, 320, 32, 32), (320, 320, 3, 3)),
    "linear, 320 to 1280, 1024 tokens": (functional.linear, (1024, 320), (1280, 320)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", action="store_true", help="a full-size step too; takes 10 GiB of RAM and minutes")
    parser.add_argument("--demo", action="store_true", help="a step of the demo too; takes a minute")
    given = parser.parse_args()
    pick_device()
    torch.set_num_threads(1)
    for what in _LAYERS:
        _compare(what, {(compute, compute): _layer(what, dtype) for compute, dtype in DTYPES.items()}, times=5)
    if given.step:
        with patch.object(adam8, "update_", lambda *_: None):
            work = {compute: Work(MODELS["sd15"], 256, compute=compute) for compute in ("fp32", "bf16")}
            _compare("step", {(computed(name, _CPU), name): Ours(task, _CPU).step for name, task in work.items()}, 3)
    if given.demo:
        task, names = Work(load(DEMO).model.name, 64), ("bnb-adam8", "adam8")
        steps = {name: Ours(task, _CPU, optimizer={"name": name}).step for name in names}
        arithmetic = computed("bf16", _CPU)
        _compare("demo step", {(f"{arithmetic}, {name}", "bf16"): step for name, step in steps.items()}, times=30)


def _layer(what: str, dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward."""
    function, *shapes = _LAYERS[what]
    x, weight = ((0.02 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes)
    return lambda: torch.autograd.grad(function(x, weight).float().sum(), (x, weight))


def _compare(what: str, work: dict[tuple[str, str], Callable[[], object]], times: int) -> None:
    """A row for each, by how it computes and the precision that was asked for, after one time that does not count."""
    taken: dict[tuple[str, str], list[float]] = {kind: [] for kind in work}
    for _ in range(1 + times):
        for kind, do in work.items():
            began = time.process_time()
            do()
            taken[kind].append(time.process_time() - began)
    seconds = {kind: median(each[1:]) for kind, each in taken.items()}
    first = next(iter(seconds.values()))
    for (compute, asked), own in seconds.items():
        row = {
            "what": what,
            "compute": compute,
            "native": is_native(DTYPES[asked], _CPU),
            "processor_s": f"{own:.4g}",
            "times_first": f"{own / first:.3g}",
        }
        add_row("half_precision", row)
        print("  ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
