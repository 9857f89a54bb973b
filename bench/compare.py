"""Our training step beside what people would use instead, on the same work: seconds, memory, start-up, bytes written.

    python bench/compare.py --model sd15 --resolution 512 --vram 4,6,8,10,12,16GiB
    python bench/compare.py --peer diffusers=DIFFUSERS/examples/dreambooth/train_dreambooth.py

Every recipe runs in a process of its own. With --vram each runs once under every budget: the GPU's allocator refuses
what goes over it, `ours` takes the strategy that the plan chooses, and running out of memory is a result like any
other. Without it `ours` runs under every strategy of its ladder. All of them, peers too, take memory in segments that
grow where PyTorch has them (lowvram_db/memory/segments.py). A row a run goes to bench/results/compare.csv;
bench/plots.py makes plots and table of them.

`noisy` marks a run whose steps differed by more than a fifth, or that shared a CPU with other work.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from adam8 import MODELS
from machine import add_row, computed
from peers import KINDS, run_peer
from recipes import Classic, Ours, Work, measured
from usage import bytes_written

from lowvram_db.errors import UserError
from lowvram_db.memory.budget import cap
from lowvram_db.memory.device import pick_device
from lowvram_db.memory.heap import keep_freed_memory
from lowvram_db.memory.size import parse_size
from lowvram_db.plan.choose import choose
from lowvram_db.train.strategy import Event, Strategy

_RECIPES = "ours", "ours-residual", "classic"
_FIGURES = ("step_s", "low_s", "high_s", "allocated_gib", "reserved_gib", "process_gib", "startup_s", "written_mib")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        for result in _child(**json.loads(sys.argv[2])):
            print(json.dumps(result), flush=True)
        return
    given = _arguments()
    device = pick_device().type
    if given.device == "cuda" and device == "cpu":
        _refuse("--device cuda: no GPU answers here; leave --device out to run on the CPU")
    device = given.device or device
    budgets: list[int | None] = [None]
    if given.vram:
        if device == "cpu":
            _refuse("--vram: caps a GPU's allocator, and this runs on a CPU; leave it out")
        try:
            budgets = [parse_size(size if size.endswith("B") else f"{size}GiB") for size in given.vram.split(",")]
        except UserError as error:
            _refuse(f"--vram: {error}")
    peers = [_peer(text) for text in given.peer]
    recipes = given.recipes.split(",")
    if unknown := set(recipes) - set(_RECIPES):
        _refuse(f"--recipes: no {unknown.pop()!r}; there are {', '.join(_RECIPES)}")
    model = MODELS.get(given.model, given.model)
    resolution = given.resolution or (512 if device == "cuda" else 256)
    work = Work(model, resolution, given.batch, not given.no_prior, given.compute, given.attention)
    steps = given.steps or (10 if device == "cuda" else 2)
    checkpointed = _counts(given.checkpointed, work, given.vram)
    for budget in budgets:
        for recipe in recipes:
            for result in _run(recipe, work, device, steps, budget, checkpointed):
                _report(work, device, budget, steps, result)
        for kind, script in peers:
            _report(work, device, budget, steps, run_peer(kind, script, given.model, work, device, steps, budget))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help="sd15, sdxl, or a folder (default sd15)")
    parser.add_argument("--resolution", type=int, help="default 512, on a CPU 256")
    parser.add_argument("--batch", type=int, default=1, help="photos a step; as many class images beside them")
    parser.add_argument("--no-prior", action="store_true", help="no class images")
    parser.add_argument("--compute", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--attention", default="auto", choices=["auto", "sdpa", "xformers"])
    parser.add_argument("--steps", type=int, help="that count, after one that does not; default 10, on a CPU 2")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--recipes", default="ours,classic", help=f"of {', '.join(_RECIPES)}")
    parser.add_argument("--checkpointed", help="strategies of ours: how many blocks, such as 0,9; default all")
    parser.add_argument("--vram", help="budgets, such as 6,8,10,12,16GiB")
    parser.add_argument("--peer", action="append", default=[], metavar="KIND=SCRIPT", help=f"of {', '.join(KINDS)}")
    return parser.parse_args()


def _refuse(problem: str) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr)
    raise SystemExit(2)


def _peer(text: str) -> tuple[str, Path]:
    kind, _, script = text.partition("=")
    if kind not in KINDS or not script:
        _refuse(f"--peer {text}: give KIND=SCRIPT, with one of {', '.join(KINDS)}")
    return kind, Path(script)


def _counts(text: str | None, work: Work, vram: str | None) -> list[int]:
    """How many blocks are checkpointed in each strategy that is asked for, smallest strategy first."""
    try:
        blocks = work.family().checkpoint_steps
        counts = [int(count) for count in text.split(",")] if text else list(range(blocks + 1))
    except ValueError:
        _refuse(f"--checkpointed {text}: numbers of blocks are wanted, such as 0,9")
    except UserError as error:
        _refuse(str(error))
    if text and vram:
        _refuse("--checkpointed: under --vram the plan chooses; leave one of them out")
    if not all(0 <= count <= blocks for count in counts):
        _refuse(f"--checkpointed {text}: {work.model} has {blocks} blocks")
    return sorted(counts, reverse=True)


def _run(
    recipe: str, work: Work, device: str, steps: int, budget: int | None, checkpointed: list[int]
) -> list[dict[str, Any]]:
    """What a process of its own says of a recipe: a result a strategy."""
    job = {"recipe": recipe, "work": asdict(work), "device": device, "steps": steps, "budget": budget}
    job["checkpointed"] = checkpointed
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(job)], capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        results.append({"recipe": recipe, "outcome": f"failed ({done.returncode}): {last}"})
    return results


def _child(
    recipe: str, work: dict[str, Any], device: str, steps: int, budget: int | None, checkpointed: list[int]
) -> Iterator[dict[str, Any]]:
    """Runs in a process of its own: one recipe, under each of its strategies."""
    where, task = torch.device(device), Work(**work)
    cap(budget, where)
    if recipe.startswith("ours") and device == "cpu":
        keep_freed_memory()  # as pick_device() does, which a run of ours begins with
    began = psutil.Process().create_time()
    strategies: list[tuple[Strategy | None, list[Event]]] = [(None, [])]
    if recipe.startswith("ours"):
        strategies = [*_strategies(task, recipe, budget, checkpointed)]
    made: Ours | Classic | None = None
    for strategy, order in strategies:
        name = recipe if strategy is None else f"{recipe}, {strategy}"
        try:
            if isinstance(made, Ours) and strategy:
                made.learner.use(strategy)
            else:
                ours = strategy is not None
                made = Ours(task, where, strategy, order, **_sections(recipe)) if ours else Classic(task, where)
            figures = measured(made, steps, where)
        except torch.OutOfMemoryError:
            yield {"recipe": name, "outcome": "out of memory"}
            return  # what comes after it in the ladder takes more
        figures |= {"startup_s": figures.pop("first_done") - began, "written_mib": bytes_written() / 2**20}
        yield {"recipe": name, "outcome": "ok", **figures}
        began = time.time()


def _sections(recipe: str) -> dict[str, Any]:
    return {"precision": {"weights": "bf16+residual"}} if recipe == "ours-residual" else {}


def _strategies(
    work: Work, recipe: str, budget: int | None, checkpointed: list[int]
) -> Iterator[tuple[Strategy, list[Event]]]:
    """The plan's choice under a budget, else those asked for; each with the order of gradients, as far as it counts."""
    family = work.family()
    if budget is not None:
        plan = choose(work.config(**_sections(recipe)), family, budget)
        yield plan.strategy, plan.order
        return
    for count in checkpointed:
        yield Strategy(count, family.checkpoint_steps), []


def _report(work: Work, device: str, budget: int | None, steps: int, result: dict[str, Any]) -> None:
    ok = result["outcome"] == "ok"
    spread = (result["high_s"] - result["low_s"]) / result["step_s"] if ok else 0.0
    crowded = device == "cpu" and os.getloadavg()[0] > (os.cpu_count() or 1) + 0.5
    row = {
        "device": device,
        "model": work.model.rpartition("/")[2],
        "resolution": work.resolution,
        "batch": f"{work.batch} + {work.batch} prior" if work.prior else str(work.batch),
        "compute": computed(work.compute, torch.device(device)),
        "threads": torch.get_num_threads() if device == "cpu" else "",
        "recipe": result["recipe"],
        "budget_gib": f"{budget / 2**30:g}" if budget else "",
        "outcome": result["outcome"],
        "steps": steps,
        **{name: f"{result[name]:.3f}" if ok else "" for name in _FIGURES},
        "photos_s": f"{work.rows / result['step_s']:.3f}" if ok else "",
        "noisy": "yes" if spread > 0.2 or crowded else "",
        **result.get("made_with", {}),  # a peer's own versions
    }
    add_row("compare", row)
    print("  ".join(str(value) for value in row.values() if value != ""), flush=True)


if __name__ == "__main__":
    main()
