"""How fast is an optimizer step, and what does it hold? `python bench/adam8.py --model sd15`

Steps each optimizer over a model's whole parameter list (random weights and gradients) and appends a row a contender to
bench/results/adam8.csv: milliseconds (median), GB/s it must move at the least beside a copy's on this machine, bytes
held a weight. Without a GPU it takes --share of the list and the row names the processor: times on a CPU say nothing
about cards.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from machine import add_row
from torch import nn

from lowvram_db.families.known import known_config
from lowvram_db.memory.device import pick_device
from lowvram_db.optim.adam8 import Adam8

MODELS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
LR = 2e-6


def ours(weights: Any) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: Adam8(parameters, lr=LR, weights=weights)


def bitsandbytes(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params=parameters, lr=LR)


def torchao(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=LR, bf16_stochastic_round=True)


def flashoptim(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    return FlashAdamW(parameters, lr=LR)


def torch_fused(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, fused=True)


# name: (module it needs, dtype of the weights it is given, bytes it must move a weight, how it is made)
CONTENDERS: dict[str, tuple[str, torch.dtype, float, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]] = {
    "ours, bf16": ("torch", torch.bfloat16, 10.03, ours("bf16")),
    "ours, bf16+residual": ("torch", torch.bfloat16, 12.03, ours("bf16+residual")),
    "bitsandbytes AdamW8bit, fp32": ("bitsandbytes", torch.float32, 16.06, bitsandbytes),
    "bitsandbytes AdamW8bit, bf16": ("bitsandbytes", torch.bfloat16, 10.06, bitsandbytes),
    "torchao AdamW8bit, bf16 SR": ("torchao", torch.bfloat16, 10.06, torchao),
    "FlashOptim AdamW, bf16": ("flashoptim", torch.bfloat16, 12.25, flashoptim),
    "torch AdamW fused, fp32": ("torch", torch.float32, 28.0, torch_fused),
}


def parameter_shapes(model: str, share: float) -> list[torch.Size]:
    """The shapes of a model's parameters; the first ones that make up `share` of its weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**known_config(MODELS[model], "unet"))
    shapes = [parameter.shape for parameter in unet.parameters()]
    wanted, chosen = share * sum(shape.numel() for shape in shapes), list[torch.Size]()
    for shape in shapes:
        if sum(one.numel() for one in chosen) < wanted:
            chosen.append(shape)
    return chosen


def copy_speed(device: torch.device) -> float:
    """GB/s, read and written, of copying 1 GiB (64 MiB on a CPU)."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device, 20)
    return 2 * source.nbytes / seconds / 1e9


def timed(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of a call, after two that do not count."""
    times = []
    for repeat in range(repeats + 2):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        if repeat >= 2:
            times.append(time.perf_counter() - began)
    return median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(name: str, shapes: list[torch.Size], device: torch.device, repeats: int) -> dict[str, object]:
    _, dtype, moved, make = CONTENDERS[name]
    torch.manual_seed(0)
    parameters = [nn.Parameter(0.03 * torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = 1e-4 * torch.randn_like(parameter)
    seconds = timed(optimizer.step, device, repeats)
    weights = sum(shape.numel() for shape in shapes)
    held = sum(p.nbytes for p in parameters)
    values = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [part for value in values if isinstance(value, torch.Tensor) for part in parts(value)]
    held += sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    return {
        "million_weights": f"{weights / 1e6:.1f}",
        "ms": f"{seconds * 1e3:.2f}",
        "gb_s": f"{moved * weights / seconds / 1e9:.1f}",
        "bytes_held_a_weight": f"{held / weights:.3f}",
    }


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor is made of: torchao's state is a class of its own, of codes and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--share", type=float, help="of the model's weights; default: all on a GPU, 0.1 on a CPU")
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    device = pick_device()
    shapes = parameter_shapes(given.model, given.share or (1.0 if device.type == "cuda" else 0.1))
    copy = copy_speed(device)
    for name, (module, *_) in CONTENDERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"{name}: {module} is not installed", flush=True)
            continue
        try:
            figures = measure(name, shapes, device, given.repeats)
        except Exception as error:  # what a contender cannot do here is its own affair
            print(f"{name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
            continue
        row = {"optimizer": name, "model": given.model, **figures, "copy_gb_s": f"{copy:.1f}"}
        add_row("adam8", row)
        print("  ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
