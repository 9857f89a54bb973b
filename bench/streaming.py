"""What does a step cost when Adam's state, or the weights too, live in RAM? `python bench/streaming.py --simulate`,
which needs no GPU

Traces a training step on tensors without values (1 photo + 1 class image, checkpointing everywhere, adam8, bf16),
makes the schedule that such a run has, and computes when each copy and computation of a steady step ends: a row a card,
system, model and share of the weights in bench/results/streaming.csv, beside what is planned for such a step, without
the driver's. Each timeline is compared with that of the engine itself, which runs
the same schedule in made-up time with parcels of a 2,048th of their size. Computed, not measured. What is assumed:

- Arithmetic at 60% of the card's dense bf16 rate with fp32 sums: what a model of a 4070 (machine code and dispatch
  counts, without the card) comes to, 6.13 TFLOP in 176 ms. Rates and bandwidths: NVIDIA's data sheets and its Ampere
  and Ada whitepapers; a laptop's 4060 at 115 W.
- Memory-bound operations: the bytes a floating point operation that the same model counts (23 ms of 176 for Stable
  Diffusion 1.5, 166 of 1,485 for SDXL, at 504 GB/s), spread as the arithmetic is.
- The optimizer: 10.03 bytes a weight at 85% of the bandwidth.
- A copy, in either direction and with both at once: 24 GB/s over 16 lanes of PCIe 4.0, assumed from the 31.5 that the
  wire carries; in proportion over other lanes. Copies take nothing from the computation, and all RAM is pinned.
- The host is always ahead; a copy costs 10 microseconds to begin.
"""

import argparse
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from machine import add_row
from recipes import Work, everywhere

from lowvram_db.memory.overheads import CONTEXT
from lowvram_db.memory.stream.engine import Stream
from lowvram_db.memory.stream.made_up import MadeUpTime
from lowvram_db.memory.stream.ram import Ram
from lowvram_db.memory.stream.schedule import Use, Visit, planned, whole_granules
from lowvram_db.memory.stream.timeline import Timing, simulated
from lowvram_db.plan import predict
from lowvram_db.plan.waiting import Rates, timings
from lowvram_db.train.strategy import EIGHTHS
from lowvram_db.train.streaming import Moving

MODELS = {"sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512),
          "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 1024)}  # fmt: skip
SCALE = 2048  # by which parcels are smaller where the engine itself runs
ROUNDS = 3  # steps that are simulated; the last counts

TENSOR_SHARE, MEMORY_SHARE = 0.6, 0.85
ADAM8_BYTES = 10.03  # moved a weight and step
BYTES_A_FLOP = {"sd15": 23 / 176 * 504e9 / 34.8e12, "sdxl": 166 / 1485 * 504e9 / 34.8e12}
LANE = {"PCIe 3.0": 0.75e9, "PCIe 4.0": 1.5e9, "PCIe 5.0": 3e9}  # bytes a second that arrive


class Card(NamedTuple):
    teraflops: float
    gigabytes_a_second: float
    lanes: int
    newest: str  # generation of PCIe that it has


CARDS = {
    "RTX 3060": Card(25.5, 360, 16, "PCIe 4.0"),
    "RTX 4060 Ti": Card(44.1, 288, 8, "PCIe 4.0"),
    "RTX 4070": Card(58.3, 504, 16, "PCIe 4.0"),
    "RTX 4080": Card(97.5, 716.8, 16, "PCIe 4.0"),
    "RTX 4060 Laptop": Card(29.1, 256, 8, "PCIe 4.0"),
    "H100": Card(989, 3350, 16, "PCIe 5.0"),
}


class Traced(NamedTuple):
    """What a step of some strategy moves, and what it has computed at each event of that."""

    what: Moving
    done: list[int]  # floating point operations
    peak: int  # bytes of the card that a plan gives such a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", required=True, help="there is nothing else yet")
    parser.add_argument("--models", default="sd15,sdxl")
    for model in parser.parse_args().models.split(","):
        name, resolution = MODELS[model]
        for traced in trace(Work(name, resolution)):
            for card_name, card in CARDS.items():
                for system, rate in LANE.items():
                    if system <= card.newest:
                        report(model, card_name, system, traced, card, rate * card.lanes)


def trace(work: Work) -> list[Traced]:
    """All of the state, and ever more of the weights."""
    family = work.family()
    resident = everywhere(family)
    with predict.rehearsal(work.config(), family) as traced:
        phases, found = traced.steps(resident), []
        for eighths in range(EIGHTHS + 1):
            what = traced.moving(replace(resident, streamed=EIGHTHS, weights=eighths))
            peak = max(phase.peak_bytes for phase in traced.moved(what.strategy, phases))
            found.append(Traced(what, traced.done(what), peak))
        return found


def run_by_the_engine(
    sizes: Sequence[int], uses: Sequence[Use], visits: Sequence[Visit], times: Sequence[Timing], room: int
) -> list[float]:
    """When each step ends by the engine itself, in made-up time: seconds."""
    computing: deque[float] = deque()  # what each computation takes, before it is asked for
    asked = {"up": 0, "down": 0}
    leaving: list[list[int]] = [[] for _ in uses]  # by the use at whose end they are let go
    for number, use in enumerate(uses):
        leaving[number + use.until].insert(0, number)
    left = list(chain.from_iterable(leaving))
    carried = {"up": range(len(uses)), "down": [number for number in left if uses[number].changes]}

    def duration(lane: str, size: int) -> float:
        if lane == "compute":
            return computing.popleft()
        number = asked[lane]
        asked[lane] += 1
        return getattr(times[carried[lane][number % len(carried[lane])]], lane)

    lanes = MadeUpTime(duration)
    ram = Ram(lanes, sum(sizes), sum(sizes))
    stream = Stream(visits, [ram.home(size) for size in sizes], ram, lanes, lanes.room(room))
    for _ in range(ROUNDS):
        for use, time, gone in zip(uses, times, leaving, strict=True):
            computing.append(time.before)
            lanes.work()
            stream.take(use.parcel)
            computing.append(time.own)
            lanes.work()
            for number in gone:
                computing.append(0.0)
                stream.give_back(uses[number].parcel)
    ends = [done.end for done in lanes.timeline if done.lane == "compute" and done.size]
    lanes.close()
    return ends[len(uses) - 1 :: len(uses)]


def report(model: str, name: str, system: str, traced: Traced, card: Card, copy_rate: float) -> None:
    what, room = traced.what, traced.what.room
    flop = 1 / (TENSOR_SHARE * card.teraflops * 1e12) + BYTES_A_FLOP[model] / (card.gigabytes_a_second * 1e9)
    weight = ADAM8_BYTES / (MEMORY_SHARE * card.gigabytes_a_second * 1e9)
    given = Rates(1 / flop, copy_rate, copy_rate, "")
    times = timings(what, [operations * flop for operations in traced.done], lambda p: p.numel() * weight, given)
    uses = list(chain.from_iterable(what.uses))
    small = [whole_granules(-(-size // SCALE)) for size in what.sizes]
    visits = planned(uses, small, room // SCALE)
    by_engine, alone = run_by_the_engine(small, uses, visits, times, room // SCALE), simulated(visits, times, ROUNDS)
    differs = max(abs(a - b) / b for a, b in zip(by_engine, alone, strict=True))
    ends = simulated(planned(uses, what.sizes, room), times, ROUNDS)
    resident = sum(time.before + time.own for time in times)
    step, (up, down) = ends[-1] - ends[-2], what.carried
    row = {
        "card": name,
        "system": f"{system} x{card.lanes}",
        "model": model,
        "weights_eighths": what.strategy.weights,
        "planned_gib": f"{(traced.peak - CONTEXT) / 2**30:.2f}",
        "room_mib": room // 2**20,
        "up_gb": f"{up / 1e9:.2f}",
        "down_gb": f"{down / 1e9:.2f}",
        "up_s": f"{sum(time.up for time in times):.3f}",
        "resident_s": f"{resident:.3f}",
        "streamed_s": f"{step:.3f}",
        "times_resident": f"{step / resident:.3f}",
        "engine_differs": f"{differs:.1e}",
    }
    add_row("streaming", row)
    print("  ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
