"""How fast is an optimizer step, and what does it hold? `python bench/adam8.py --model sd15`

Steps each optimizer over a model's whole parameter list (random weights and gradients) and appends a row a contender to
bench/results/adam8.csv: milliseconds (median), GB/s it must move at the least beside a copy's on this machine, bytes
held a weight. Without a GPU it takes --share of the list, the contenders step in turn, and the row names the processor:
times on a CPU say nothing about cards. `--model small` has tensors of 4,096 weights only, `--model sd15-lora` those of
a LoRA of rank 16 for the attention of SD 1.5, which only the contenders in fp32 step; `--busy` lets another process
keep a core to itself meanwhile.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from machine import add_row
from torch import nn

from lowvram_db.families import open_blank
from lowvram_db.formats.known import family_folder, known_config
from lowvram_db.memory.device import pick_device
from lowvram_db.optim.adam8 import Adam8
from lowvram_db.sections import MethodConfig
from lowvram_db.train.adapter import adapt, trainable

MODELS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
LR = 2e-6


def ours(weights: Any, kernels: Any = "auto") -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: Adam8(parameters, lr=LR, weights=weights, kernels=kernels)


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
    "ours, bf16, as PyTorch operations": ("torch", torch.bfloat16, 10.03, ours("bf16", "torch")),
    "ours, fp32": ("torch", torch.float32, 16.03, ours("fp32")),
    "bitsandbytes AdamW8bit, fp32": ("bitsandbytes", torch.float32, 16.06, bitsandbytes),
    "bitsandbytes AdamW8bit, bf16": ("bitsandbytes", torch.bfloat16, 10.06, bitsandbytes),
    "torchao AdamW8bit, bf16 SR": ("torchao", torch.bfloat16, 10.06, torchao),
    "FlashOptim AdamW, bf16": ("flashoptim", torch.bfloat16, 12.25, flashoptim),
    "torch AdamW fused, fp32": ("torch", torch.float32, 28.0, torch_fused),
}


def parameter_shapes(model: str, share: float) -> list[torch.Size]:
    """The shapes of a model's parameters; the first ones that make up `share` of its weights."""
    if model == "small":
        return [torch.Size([64, 64])] * 2000
    if model == "sd15-lora":
        unet: Any = open_blank(family_folder("sd1")).load_denoiser()
        adapt(unet, "unet", MethodConfig(name="lora", rank=16), dict(unet.named_parameters()), seed=0)
        return [parameter.shape for parameter in trainable(unet, dict(unet.named_parameters())).values()]
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
    return timed_in_turn([call], device, repeats)[0]


def timed_in_turn(calls: list[Callable[[], Any]], device: torch.device, repeats: int) -> list[float]:
    """Median seconds of each call, made in turn, after two rounds that do not count."""
    rounds = []
    for _ in range(repeats + 2):
        times = []
        for call in calls:
            _wait(device)
            began = time.perf_counter()
            call()
            _wait(device)
            times.append(time.perf_counter() - began)
        rounds.append(times)
    return [median(times) for times in zip(*rounds[2:], strict=True)]


@contextmanager
def a_core_busy() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def made(name: str, shapes: list[torch.Size], device: torch.device) -> torch.optim.Optimizer:
    """The contender, with gradients, after a first step: what it cannot do here shows."""
    _, dtype, _, make = CONTENDERS[name]
    torch.manual_seed(0)
    parameters = [nn.Parameter(0.03 * torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = 1e-4 * torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def figures(name: str, optimizer: torch.optim.Optimizer, seconds: float) -> dict[str, object]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weights, held = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
    values = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [part for value in values if isinstance(value, torch.Tensor) for part in parts(value)]
    held += sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    return {
        "million_weights": f"{weights / 1e6:.1f}",
        "ms": f"{seconds * 1e3:.2f}",
        "gb_s": f"{CONTENDERS[name][2] * weights / seconds / 1e9:.1f}",
        "bytes_held_a_weight": f"{held / weights:.3f}",
    }


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor is made of: torchao's state is a class of its own, of codes and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "small", "sd15-lora"], default="sd15")
    parser.add_argument("--share", type=float, help="of the model's weights; default: all on a GPU, 0.1 on a CPU")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--busy", action="store_true")
    given = parser.parse_args()
    device = pick_device()
    shapes = parameter_shapes(given.model, given.share or (1.0 if device.type == "cuda" else 0.1))
    model, copy = given.model + (", a core busy" if given.busy else ""), copy_speed(device)
    names = [name for name in CONTENDERS if given.model != "sd15-lora" or CONTENDERS[name][1] == torch.float32]
    groups = [[name] for name in names] if device.type == "cuda" else [names]
    for group in groups:
        optimizers = {}
        for name in group:
            if importlib.util.find_spec(CONTENDERS[name][0]) is None:
                print(f"{name}: {CONTENDERS[name][0]} is not installed", flush=True)
                continue
            try:
                optimizers[name] = made(name, shapes, device)
            except Exception as error:  # what a contender cannot do here is its own affair
                print(f"{name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
        with a_core_busy() if given.busy else nullcontext():
            seconds = timed_in_turn([optimizer.step for optimizer in optimizers.values()], device, given.repeats)
        for (name, optimizer), time_taken in zip(optimizers.items(), seconds, strict=True):
            row = {
                "optimizer": name,
                "model": model,
                **figures(name, optimizer, time_taken),
                "copy_gb_s": f"{copy:.1f}",
            }
            add_row("adam8", row)
            print("  ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
