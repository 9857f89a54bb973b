"""Is a step with state, or weights, in RAM bit for bit the step without? `bench/streaming_proof.py --schedules 1000`

On a CPU: miniatures of Stable Diffusion 1.5 and SDXL in turn, 20 steps of each from the same weights, with the state
streamed in made-up time: at random an eighth to all of it, or all and as much of the weights, a few neighbours in the
order of events swapped, copies that take between nothing and very long, all RAM pinned or none. A row says how many
were the same; a canary or a race ends it. On a GPU, with --model: a true size once, beside the peak of memory, and the
time of a step beside the one that is simulated by rates measured there and the resident step's time; by deterministic
kernels, and after a resident run that has to repeat itself, for the usual ones do not.
On a CPU, with --model: one step of a true size, at 256 px, after which weights, state and room that would lie on a card
are counted beside the plan's.
Rows go to bench/results/streaming_proof.csv.
"""

import argparse
import hashlib
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from machine import add_row
from recipes import Ours, Work, everywhere
from torch import Tensor

from lowvram_db.demo.miniature import write_pipeline, write_sdxl
from lowvram_db.memory.arithmetic import deterministic
from lowvram_db.memory.device import peak_bytes, pick_device, release_memory, reset_peak
from lowvram_db.memory.stream import pinning
from lowvram_db.memory.stream.made_up import MadeUpTime
from lowvram_db.memory.stream.ram import Ram
from lowvram_db.optim.adam8 import Adam8
from lowvram_db.optim.storage import SMALLEST
from lowvram_db.plan import predict
from lowvram_db.plan.waiting import rates, waiting
from lowvram_db.train.strategy import EIGHTHS, Event, Strategy

STEPS = 20
WEIGHTS = "weights and state"
MODELS = {"sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512),
          "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 1024)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first of them, by its number")
    parser.add_argument("--model", choices=MODELS)
    given = parser.parse_args()
    if given.schedules:
        with tempfile.TemporaryDirectory() as folder:
            write_pipeline(Path(folder) / "sd15")
            write_sdxl(Path(folder) / "sdxl")
            for model in MODELS:
                _miniature(model, Path(folder) / model, given.first, given.schedules // len(MODELS))
    if given.model and pick_device().type == "cpu":
        _counted(given.model, MODELS[given.model][0])
    elif given.model:
        _true_size(given.model, *MODELS[given.model])


def trained(work: Work, strategy: Strategy, order: list[Event]) -> tuple[str, float, int]:
    """What STEPS steps leave, weights and state, as a digest; the seconds of one, the first left out; and the peak of
    the device's memory, in bytes."""
    device = pick_device()
    reset_peak(device)
    recipe = Ours(work, device, strategy, order, train={"lr": 1e-3})
    recipe.step()
    began = _now()
    for _ in range(STEPS - 1):
        recipe.step()
    seconds, peak = (_now() - began) / (STEPS - 1), peak_bytes(device)
    optimizer, digest = recipe.learner.optimizer, hashlib.sha256()
    assert isinstance(optimizer, Adam8)
    states = optimizer.state_dict()["state"].values()
    state = [value for held in states for value in held.values() if isinstance(value, Tensor)]
    with optimizer.at_rest():
        weights = [optimizer.kept(parameter).clone() for parameter in recipe.learner.parameters]
    for tensor in (*weights, *state):
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest(), seconds, peak


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def order_of(work: Work) -> list[Event]:
    strategy = everywhere(work.family())
    with predict.rehearsal(work.config(), work.family()) as traced:
        traced.steps(strategy)
        return traced.order()


def _miniature(model: str, folder: Path, first: int, schedules: int) -> None:
    work = Work(str(folder), 64)
    order, strategy = order_of(work), everywhere(work.family())
    wanted = trained(work, strategy, order)[0]
    same = sum(_random_schedule(work, strategy, order, seed) == wanted for seed in range(first, first + schedules))
    row = {
        "model": f"{model} in miniature",
        "moved": f"state or {WEIGHTS}",
        "steps": STEPS,
        "schedules": schedules,
        "same": same,
    }
    _report(row)


def _random_schedule(work: Work, strategy: Strategy, order: list[Event], seed: int) -> str:
    generator = random.Random(seed)
    for _ in range(generator.choice([0, 0, 3])):
        place = generator.randrange(len(order) - 1)
        order = [*order[:place], order[place + 1], order[place], *order[place + 2 :]]

    def made_up(_: object) -> MadeUpTime:
        return MadeUpTime(lambda lane, size: size * generator.choice([0.0, 0.1, 1.0, 20.0]) * generator.random())

    def ram(lanes: MadeUpTime, total: int, pinned: int) -> Ram:
        return Ram(lanes, total, generator.choice([0, pinned // 2, pinned]))

    eighths = generator.randint(1, EIGHTHS)
    streamed = replace(strategy, streamed=eighths)
    if generator.random() < 0.5:
        streamed = replace(strategy, streamed=EIGHTHS, weights=eighths)
    with patch.object(pinning, "MadeUpTime", made_up), patch.object(pinning, "Ram", ram):
        return trained(work, streamed, order)[0]


def _weights(strategy: Strategy) -> Strategy:
    return replace(strategy, streamed=EIGHTHS, weights=EIGHTHS)


def _true_size(model: str, name: str, resolution: int) -> None:
    work = Work(name, resolution)
    resident = everywhere(work.family())
    ways = {"": resident, "again": resident, "state": replace(resident, streamed=EIGHTHS), WEIGHTS: _weights(resident)}
    moved, found = ("state", WEIGHTS), {}
    with predict.rehearsal(work.config(), work.family()) as traced:
        traced.steps(resident)
        order, given = traced.order(), rates(None)
        schedules = {way: traced.moving(ways[way]) for way in moved}
        waits = {way: waiting(what, traced.done(what), given) for way, what in schedules.items()}
    for way, strategy in ways.items():
        with deterministic(True):
            found[way] = trained(work, strategy, order)
        release_memory()
    wanted, before, most = found[""]
    if found["again"][0] != wanted:
        raise SystemExit(f"{model}: two resident runs differ, so that a streamed one says nothing")
    for way in moved:
        got, now, peak = found[way]
        row = {"model": model, "moved": way, "steps": STEPS, "schedules": 1, "same": int(wanted == got)}
        row |= {"times_resident": f"{now / before:.3f}", "resident_gib": f"{most / 2**30:.2f}"}
        _report(row | {"streamed_gib": f"{peak / 2**30:.2f}", "times_simulated": f"{1 + waits[way] / before:.3f}"})


def _counted(model: str, name: str) -> None:
    work, resident = Work(name, 256), everywhere(Work(name, 256).family())
    for way, strategy in {"state": replace(resident, streamed=EIGHTHS), WEIGHTS: _weights(resident)}.items():
        made: list[MadeUpTime] = []
        with predict.rehearsal(work.config(), work.family()) as traced:
            planned, order = traced.steps(strategy)[1].components, traced.order()

        def made_up(duration: Callable[[str, int], float], made: list[MadeUpTime] = made) -> MadeUpTime:
            made.append(MadeUpTime(duration))
            return made[-1]

        with patch.object(pinning, "MadeUpTime", made_up):
            recipe = Ours(work, pick_device(), strategy, order)
            recipe.step()
        learner = recipe.learner
        beside = (learner.optimizer.state[p] for p in learner.parameters if p.numel() < SMALLEST)
        state = [value for held in beside for value in held.values() if isinstance(value, Tensor)]
        lent = learner.lendable if strategy.weights else {}  # all of them
        weights = [p for p in learner.denoiser.parameters() if p not in lent]
        on_card = [*weights, *learner.denoiser.buffers(), *state]
        counted = made[0].card_bytes + sum(tensor.nbytes for tensor in on_card)
        sizes = {"counted_gib": counted, "planned_gib": planned["weights"] + planned["optimizer"]}
        row = {"model": f"{model}, 256 px", "moved": way, "steps": 1}
        _report(row | {key: f"{size / 2**30:.3f}" for key, size in sizes.items()})
        del recipe, learner
        release_memory()


def _report(row: dict[str, object]) -> None:
    row = {"model": "", "moved": "", "steps": "", "schedules": "", "same": "", "times_resident": "", "resident_gib": "",
           "streamed_gib": "", "counted_gib": "", "planned_gib": "", "times_simulated": "", **row}  # fmt: skip
    add_row("streaming_proof", row)
    print("  ".join(map(str, row.values())), flush=True)


if __name__ == "__main__":
    main()
