"""Pictures, and docs/measured.md's table, of compare.csv and growth.csv: `python bench/plots.py` (wants matplotlib).

Of every kind of run the latest row counts. The table is written into the page between its two marks, never by hand.
"""

import argparse
import csv
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from machine import RESULTS
from matplotlib import pyplot

PAGE = Path(__file__).parents[1] / "docs" / "measured.md"
_MARKS = "<!-- bench/plots.py: compare -->", "<!-- end -->"
_WORK = "machine", "device", "model", "resolution", "batch", "compute"  # what runs must share to be compared
Row = dict[str, str]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    runs = latest(rows("compare"), (*_WORK, "recipe", "budget_gib"))
    write_table(runs)
    for machine in {row["machine"] for row in runs if row["budget_gib"]}:
        survivors([row for row in runs if row["machine"] == machine and row["budget_gib"]], machine)
    grown = latest(rows("growth"), ("machine", "what", "value", "work"))
    for machine, what in sorted({(row["machine"], row["what"]) for row in grown}):
        growth([row for row in grown if (row["machine"], row["what"]) == (machine, what)], what, machine)


def rows(name: str) -> list[Row]:
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def latest(given: list[Row], same: tuple[str, ...]) -> list[Row]:
    """The last row of each kind, in the order in which the kinds first came."""
    return list({tuple(row[key] for key in same): row for row in given}.values())


def write_table(runs: list[Row]) -> None:
    """Recipes beside each other, without budgets; of one recipe's strategies the smallest and the fastest."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in runs:
        if not row["budget_gib"]:
            groups.setdefault((*(row[key] for key in _WORK), _recipe(row)), []).append(row)
    free = [row for group in groups.values() for row in _extremes(group)]
    lines = ["| on | recipe | peak memory, GiB | a step, s | photos a second |", "| --- | --- | --- | --- | --- |"]
    for row in free:
        memory = _memory(row)
        work = f"{row['machine'].partition(',')[0]}, {row['model']} at {row['resolution']} px, {row['batch']}"
        figures = [f"{float(row[key]):.2f}" for key in ("step_s", "photos_s")] if row["outcome"] == "ok" else ["", ""]
        said = f"{float(memory):.2f}" if row["outcome"] == "ok" else row["outcome"]
        mark = " (noisy)" if row["noisy"] else ""
        lines.append(f"| {work} | {row['recipe']} | {said}{mark} | {' | '.join(figures)} |")
    if free:
        stamps = sorted({row["commit"] for row in free})
        lines += ["", f"From [bench/results/compare.csv](../bench/results/compare.csv), commits {', '.join(stamps)}."]
    text, (begin, end) = PAGE.read_text(encoding="utf-8"), _MARKS
    if begin not in text:
        raise SystemExit(f"{PAGE}: has no line {begin}")
    body = "\n".join(["", *lines, ""])
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    PAGE.write_text(re.sub(pattern, lambda _: begin + "\n" + body + "\n" + end, text, flags=re.S), encoding="utf-8")


def _memory(row: Row) -> str:
    """Peak, GiB: on a GPU what the allocator gave out, else the whole process."""
    return row["allocated_gib"] if row["device"] == "cuda" else row["process_gib"]


def _extremes(group: list[Row]) -> list[Row]:
    """Of one recipe's rows the one with least memory and the one with the fastest step; what failed if none ran."""
    ran = [row for row in group if row["outcome"] == "ok"]
    if not ran:
        return group[-1:]
    smallest = min(ran, key=lambda row: round(float(_memory(row)), 2))  # as printed: what differs less is chance
    fastest = min(ran, key=lambda row: float(row["step_s"]))
    return [smallest] if smallest is fastest else [smallest, fastest]


def _recipe(row: Row) -> str:
    return row["recipe"].partition(",")[0]


def survivors(runs: list[Row], machine: str) -> None:
    """Photos a second of each recipe by budget; what ran out of memory stands on the floor."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for recipe in dict.fromkeys(_recipe(row) for row in runs):
        own = [row for row in runs if _recipe(row) == recipe]
        own.sort(key=lambda row: float(row["budget_gib"]))
        speed = [float(row["photos_s"]) if row["outcome"] == "ok" else 0.0 for row in own]
        axes.plot([float(row["budget_gib"]) for row in own], speed, marker="o", label=recipe)
    axes.set(xlabel="budget, GiB", ylabel="photos a second (0: does not fit)", title=machine)
    axes.legend()
    _save(figure, f"survivors-{_slug(machine)}")


def growth(runs: list[Row], what: str, machine: str) -> None:
    runs = sorted((row for row in runs if row["outcome"] == "ok"), key=lambda row: float(row["value"]))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    values = [float(row["value"]) for row in runs]
    left.plot(values, [float(row["step_s"]) for row in runs], marker="o", label="measured")
    if all(row["floor_s"] for row in runs):
        left.plot(values, [float(row["floor_s"]) for row in runs], marker=".", linestyle=":", label="floor")
    memory = "allocated_gib" if any(float(row["allocated_gib"] or 0) for row in runs) else "process_gib"
    scale, unit = (1024, "MiB that reading adds") if what == "photos" else (1, "GiB")
    right.plot(values, [scale * float(row[memory]) for row in runs], marker="o")
    left.set(xlabel=what, ylabel="seconds a batch" if what == "photos" else "seconds a step", ylim=(0, None))
    right.set(xlabel=what, ylabel=unit, ylim=(0, None))
    if what == "photos":
        left.set_xscale("log"), right.set_xscale("log")
    left.legend()
    figure.suptitle(machine)
    _save(figure, f"growth-{what}-{_slug(machine)}")


def _save(figure: "pyplot.Figure", name: str) -> None:
    figure.tight_layout()
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    pyplot.close(figure)
    print(RESULTS / f"{name}.png")


def _slug(machine: str) -> str:
    return re.sub(r"\W+", "-", machine.partition(",")[0].lower()).strip("-")


if __name__ == "__main__":
    main()
