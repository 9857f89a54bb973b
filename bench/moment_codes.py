"""Which code for Adam's moments follows fp32 Adam? `python bench/moment_codes.py [--real CONFIG]`

Feeds the same gradients to fp32 Adam and to Adam with its moments kept in each code, and appends to
bench/results/moment_codes.csv how far the sum of all updates ends from fp32's, as a share of its length, and the
largest single update. Made-up gradients: each element has a scale of its own, lognormal with `sigma` over the tensor,
noise, and a drift of 0.3 of it. --real: gradients of a run, recorded while fp32 AdamW trains:

    python bench/moment_codes.py --real configs/demo.toml --steps 10 40 250
    python bench/moment_codes.py --real runs/sd15-random/full_size.toml --steps 10 20 40 100 --set train.resolution=64
"""

import argparse
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from statistics import mean, median

import torch
from machine import add_row
from torch import Tensor

from lowvram_db.cache import Framing, Store, precompute
from lowvram_db.concept import describe, subject_photos
from lowvram_db.config import load
from lowvram_db.families import open_model
from lowvram_db.kernels import adam8, moment_code
from lowvram_db.kernels.adam8_step import Step, step_numbers
from lowvram_db.train.batches import Batches
from lowvram_db.train.trainer import Trainer

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
ELEMENTS, STEPS = 32_768, 600


class Code(ABC):
    """A moment code: what is stored of m and v, and what comes back. Arguments and results float32 [n]."""

    bytes_a_weight: float

    @abstractmethod
    def store(self, m: Tensor, v: Tensor, step: Step) -> None: ...

    @abstractmethod
    def load(self, step: Step) -> tuple[Tensor, Tensor]: ...

    def update(self, m: Tensor, v: Tensor, step: Step) -> Tensor:
        """What is taken off the weights, in units of lr, once m and v are stored."""
        return adam_update(m, v, step)


class Ours(Code):
    """9 or 10 bits of log2 v on an anchored grid, 7 or 6 of the companded ratio; blocks of 256."""

    bytes_a_weight = 2 + 4 / 256

    def store(self, m: Tensor, v: Tensor, step: Step) -> None:
        blocks = [x.view(-1, moment_code.BLOCK) for x in (m * step.ratio, v)]
        present = torch.ones_like(blocks[0], dtype=torch.bool)
        random = torch.randint(0, 2**16, present.shape, dtype=torch.int32)
        self.codes, self.scales, self.error = moment_code.quantize(*blocks, present, random)

    def load(self, step: Step) -> tuple[Tensor, Tensor]:
        u, root = moment_code.dequantize(self.codes, self.scales)
        return (u * root / step.ratio).flatten(), root.square().flatten()

    def update(self, m: Tensor, v: Tensor, step: Step) -> Tensor:
        return -adam8.new_weights(torch.zeros_like(m), m * step.ratio, v, self.error.flatten(), step)


class OursBlind(Ours):
    """The same without foresight: what rounding m costs."""

    def update(self, m: Tensor, v: Tensor, step: Step) -> Tensor:
        return adam_update(m, v, step)


class RatioLog(Code):
    """8 bits of log2 v between the block's own least and largest, 8 of m / sqrt(v), companded; blocks of 256."""

    bytes_a_weight = 2 + 12 / 256

    def store(self, m: Tensor, v: Tensor, step: Step) -> None:
        m, log = m.view(-1, 256), v.view(-1, 256).clamp(min=1e-38).log2()
        self.low = log.amin(1, keepdim=True)
        self.unit = ((log.amax(1, keepdim=True) - self.low) / 254).clamp(min=1e-12)
        self.level = ((log - self.low) / self.unit + torch.rand_like(log)).floor().clamp(0, 254)
        ratio = m / torch.exp2((self.low + self.level * self.unit) / 2)
        bent = ratio / (ratio.abs() + 0.5)
        self.scale = bent.abs().amax(1, keepdim=True).clamp(min=1e-12)
        self.place = (bent / self.scale * 127).round()

    def load(self, step: Step) -> tuple[Tensor, Tensor]:
        v = torch.exp2(self.low + self.level * self.unit)
        bent = self.place / 127 * self.scale
        return (0.5 * bent / (1 - bent.abs()) * v.sqrt()).flatten(), v.flatten()


class FlashOptim(Code):
    """Both in 8 bits by groups of 32: m by softsign, v by its root; fp16 scales (Ortiz et al. 2026, `flashoptim`)."""

    bytes_a_weight = 2 + 4 / 32

    def store(self, m: Tensor, v: Tensor, step: Step) -> None:
        m, root = m.view(-1, 32), v.sqrt().view(-1, 32)
        self.m_scale, self.root_scale = (x.abs().amax(1, keepdim=True).clamp(min=1e-12) for x in (m, root))
        normal = m / self.m_scale
        self.m_place = (2 * normal / (1 + normal.abs()) * 127).round()
        self.root_place = (root / self.root_scale * 255).round()

    def load(self, step: Step) -> tuple[Tensor, Tensor]:
        bent = self.m_place / 127
        m = bent / (2 - bent.abs()) * self.m_scale
        return m.flatten(), (self.root_place / 255 * self.root_scale).square().flatten()


class BitsAndBytes(Code):
    """Both by a dynamic map of 256 entries, blocks of 256 (Dettmers et al. 2022, `bitsandbytes`)."""

    bytes_a_weight = 2 + 8 / 256

    def __init__(self) -> None:
        from bitsandbytes.functional import create_dynamic_map

        self.maps = [create_dynamic_map(signed=signed).sort().values for signed in (True, False)]

    def store(self, m: Tensor, v: Tensor, step: Step) -> None:
        self.kept = [self._rounded(x.view(-1, 256), entries) for x, entries in zip((m, v), self.maps, strict=True)]

    @staticmethod
    def _rounded(x: Tensor, entries: Tensor) -> Tensor:
        scale = x.abs().amax(1, keepdim=True).clamp(min=1e-38)
        return (entries[torch.bucketize(x / scale, (entries[1:] + entries[:-1]) / 2)] * scale).flatten()

    def load(self, step: Step) -> tuple[Tensor, Tensor]:
        return self.kept[0], self.kept[1]


CODES: dict[str, Callable[[], Code]] = {
    "ours": Ours,
    "ours, without foresight": OursBlind,
    "ratio-log 8+8": RatioLog,
    "FlashOptim": FlashOptim,
    "bitsandbytes": BitsAndBytes,
}


def made_up(sigma: float, elements: int = ELEMENTS, steps: int = STEPS, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = 1e-4 * torch.exp(sigma * torch.randn(elements, generator=generator))
    drift = 0.3 * torch.randn(elements, generator=generator)
    for _ in range(steps):
        yield scale * (torch.randn(elements, generator=generator) + drift)


def compare(code: Code, gradients: Iterable[Tensor]) -> tuple[float, float]:
    """(distance of the displacement from fp32 Adam's as a share of its length, largest update in units of lr)."""
    torch.manual_seed(0)
    first = next(gradients := iter(gradients))
    exact_m, exact_v, exact, ours, zero = (torch.zeros_like(first) for _ in range(5))
    largest = 0.0
    for t, g in enumerate(_chain(first, gradients), 1):
        step = step_numbers(t, lr=1.0, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0)
        exact_m, exact_v = BETA1 * exact_m + (1 - BETA1) * g, BETA2 * exact_v + (1 - BETA2) * g * g
        exact = exact - adam_update(exact_m, exact_v, step)
        before = step_numbers(max(1, t - 1), lr=1.0, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0)
        m, v = code.load(before) if t > 1 else (zero, zero)
        m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
        code.store(m, v, step)
        update = code.update(m, v, step)
        largest = max(largest, update.abs().max().item())
        ours = ours - update
    return ((ours - exact).norm() / exact.norm()).item(), largest


def adam_update(m: Tensor, v: Tensor, step: Step) -> Tensor:
    """Adam's, in units of lr."""
    return m * step.ratio / (v.sqrt() + step.root_eps)


def _chain(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def recorded(path: Path, overrides: list[str], steps: int) -> dict[str, list[Tensor]]:
    """Gradients of a config's run: the first 8,192 elements of every large tensor, by name, [steps] each."""
    config = load(path, ["optimizer.name=adamw", "precision.compute=fp32", *overrides])
    family, photos = open_model(config.model.name), subject_photos(config)
    concept = describe(config, photos, photos[::-1])  # the model's own class images would have to be drawn first
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder)) as store:
        cached = precompute(
            family,
            store,
            device,
            framing=Framing(config.train.resolution),
            photos=concept.instance_photos,
            class_photos=concept.class_photos,
            prompts=concept.prompts,
        )
        trainer = Trainer(config, family, Batches(concept, cached, 1, 0), device)
        large = {n: p for n, p in trainer.denoiser.named_parameters() if p.numel() >= 8192}
        gradients: dict[str, list[Tensor]] = {name: [] for name in large}
        for name, parameter in large.items():
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: gradients[name].append(p.grad.flatten()[:8192].clone())
            )
        for step in range(steps):
            loss = trainer.train_step()
            print(f"step {step + 1}: loss {loss.read().total:.4f}", flush=True)
    return gradients


def spread(gradients: list[Tensor]) -> float:
    """sigma: the standard deviation, within blocks of 256, of the log of each element's root mean square."""
    root = torch.stack(gradients).square().mean(0).sqrt().view(-1, 256)
    return root.clamp(min=1e-30).log().std(1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, metavar="CONFIG", help="gradients of this config's run")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="as lowvram-db train --set")
    parser.add_argument("--steps", type=int, nargs="+", default=[STEPS], help="a row for each of these numbers")
    given = parser.parse_args()
    if given.real:
        real = recorded(given.real, given.overrides, max(given.steps))
        for steps in given.steps:
            compare_on(given.real.stem, {name: gradients[:steps] for name, gradients in real.items()}, steps)
        return
    for name, code in CODES.items():
        for sigma, steps in product((0.5, 1.0, 2.0, 3.0), given.steps):
            figures = compare(code(), made_up(sigma, steps=steps))
            report(name, code(), f"made up, {steps} steps", sigma, *figures)


def compare_on(source: str, real: dict[str, list[Tensor]], steps: int) -> None:
    """A row a code: over the tensors the mean spread, the median error, the largest update."""
    sigma = mean(map(spread, real.values()))
    for name, code in CODES.items():
        errors, updates = zip(*(compare(code(), gradients) for gradients in real.values()), strict=True)
        report(name, code(), f"{source}, {len(real)} tensors, {steps} steps", sigma, median(errors), max(updates))


def report(name: str, code: Code, source: str, sigma: float, error: float, largest: float) -> None:
    row = {
        "code": name,
        "bytes_a_weight": f"{code.bytes_a_weight:.3f}",
        "gradients": source,
        "sigma": f"{sigma:.2f}",
        "error": f"{error:.4f}" if math.isfinite(error) else "inf",
        "largest_update": f"{largest:.2f}",
    }
    add_row("moment_codes", row)
    print("  ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
