"""A plan for people: a table of phases, bars of the components, and the ladder it was chosen from."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowvram_db.memory.size import gib
from lowvram_db.plan.result import COMPONENTS, Phase, Plan, Rung

_COLORS = dict(zip(COMPONENTS, ("blue", "cyan", "magenta", "green", "yellow", "bright_black"), strict=True))
_LETTERS = dict(zip(COMPONENTS, "WOGA-C", strict=True))  # where there are no colours
_HEADINGS = ("weights", "state", "grads", "activ.", "work", "context")
_SEEN = 0.5e-3  # seconds of a step that are worth a word
_BAR = 54  # characters of the largest phase's bar


def show(plan: Plan, explain: bool = False, console: Console | None = None) -> None:
    console = console or Console()
    console.print(_phases(plan))
    console.print(_bars(plan))
    console.print(summary(plan), markup=False, highlight=False, soft_wrap=True)
    console.print(ram(plan), markup=False, highlight=False, soft_wrap=True)
    if plan.emulation:
        console.print(f"on this machine {plan.emulation}", markup=False, highlight=False, soft_wrap=True)
    if explain:
        console.print(_ladder(plan))
        for line in streaming(plan):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _phases(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("GiB", no_wrap=True)
    for heading in (*_HEADINGS, "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for phase in plan.phases:
        figures = [f"{phase.components[kind] / 2**30:.2f}" for kind in COMPONENTS]
        peak = Text(f"{phase.peak_bytes / 2**30:.2f}", "bold" if phase is plan.peak else "")
        table.add_row(phase.name, *figures, peak)
    return table


def _bars(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for phase in plan.phases:
        table.add_row(phase.name, _bar(phase, plan.peak.peak_bytes))
    key = [Text(f"{_LETTERS[kind]} {kind}", _COLORS[kind]) for kind in COMPONENTS]
    table.add_row("", Text("  ").join(key))
    return table


def _bar(phase: Phase, longest: int) -> Text:
    bar, begun = Text(), 0
    for kind in COMPONENTS:
        end = begun + phase.components[kind]
        cells = round(end / longest * _BAR) - round(begun / longest * _BAR)
        bar.append(_LETTERS[kind] * cells, _COLORS[kind])
        begun = end
    return bar


def summary(plan: Plan) -> str:
    """One line: the peak, how it is reached, and what is left."""
    words = f"peak {gib(plan.peak.peak_bytes)} in {plan.peak.name}, with {plan.optimizer} and {plan.strategy}"
    if any(phase.name.startswith("class images") for phase in plan.phases):
        words += f", {plan.prior_batch} class images at once"
    if plan.drawn_streamed:
        words += ", pictures drawn by weights in RAM"
    if plan.budget_bytes is None:
        return f"{words}; no budget given, for example --vram 12GiB"
    return f"{words}; budget {gib(plan.budget_bytes)}"


def ram(plan: Plan) -> str:
    """One line: the computer's memory that a run on a GPU takes."""
    average = f"; {gib(plan.average_bytes)} of that for the weights' average" if plan.average_bytes else ""
    without = f"{gib(plan.least_ram_bytes)} without the copy of a checkpoint"
    return f"RAM with a GPU: about {gib(plan.ram_bytes)}, {without}{average}"


def _ladder(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("strategy, fastest first", "peak in training", "arithmetic", ""):
        table.add_column(heading)
    for rung in plan.rungs:
        peak = gib(rung.peak_bytes) if rung.traced_to_the_end else f"over {gib(rung.peak_bytes)}"
        table.add_row(str(rung.strategy), peak, _cost(rung), _why(rung, plan))
    return table


def _cost(rung: Rung) -> str:
    if rung.cost is None:
        return "?"
    waits = f", + {1000 * rung.waits:.0f} ms" if rung.waits >= _SEEN else ", copies hidden"
    return f"{rung.cost:.2f}" + (waits if rung.carried_up else "")


def streaming(plan: Plan) -> Iterator[str]:
    """Lines on what lives in RAM, for whoever wants the plan explained."""
    if plan.rates:
        up, down = (max(getattr(rung, way) for rung in plan.rungs) for way in ("carried_up", "carried_down"))
        yield f"a step copies up to {gib(up)} up and {gib(down)} down, hidden behind its arithmetic as far as it lasts:"
        yield plan.rates
    if plan.resident:
        yield plan.resident


def _why(rung: Rung, plan: Plan) -> str:
    if rung.chosen:
        return "chosen" if plan.fits is not False else "the smallest; does not fit"
    chosen = next(place for place, other in enumerate(plan.rungs) if other.chosen)
    if plan.rungs.index(rung) > chosen:
        return "not needed: slower"
    return "over the budget" if plan.budget_bytes else "no budget: the smallest is taken"


def does_not_fit(plan: Plan) -> str:
    """One line: what is needed at the least, in which phase, and what to change."""
    assert plan.budget_bytes is not None
    peak = plan.peak
    change = "; this would fit: " + ", or ".join(plan.advice) if plan.advice else "; no smaller setting fits either"
    return (
        f"does not fit {gib(plan.budget_bytes)}: at the least {gib(peak.peak_bytes)} and the margin are needed "
        f"({peak.name}, {plan.strategy}){change}"
    )
