"""The parts of a run's page that are no pictures: what it is, curves, the identifier, memory, how to make it again."""

from lowvram_db.memory.size import gib
from lowvram_db.report.curves import Curve, chart, noisy, wide
from lowvram_db.report.markup import Html, element, foreign, shortened
from lowvram_db.report.story import Story

_LONGEST_TOML = 100_000  # characters
VALIDATION = {
    "validation_subject": "photos trained on",
    "validation_held_out": "photos kept back",
    "validation_class": "class images",
}


def facts(story: Story) -> Html:
    """What was trained, in a few words."""
    seconds = sum(value for _, value in story.metrics.get("seconds", []))
    told = {
        "subject": f"{story.text('subject.identifier')} {story.text('subject.class')}".strip(),
        "base model": story.text("model.name"),
        "steps": f"{story.last_step:,}" + (f" of {int(steps):,}" if (steps := story.number("train.steps")) else ""),
        "time in steps": f"{seconds / 60:.1f} minutes" if seconds else "",
        "peak memory": gib(max(v for _, v in peaks)) if (peaks := story.metrics.get("peak_bytes")) else "",
        "optimizer": story.text("optimizer.name"),
    }
    pairs = [
        element("div", element("dt", name), element("dd", foreign(text, 200))) for name, text in told.items() if text
    ]
    return element("dl", pairs, class_="facts")


def curves(story: Story) -> Html | None:
    """Loss, validation, learning rate and memory."""
    metrics = story.metrics
    peak = [(step, value / 2**30) for step, value in metrics.get("peak_bytes", [])]
    validation = [
        Curve(label, metrics[name], colour)
        for colour, (name, label) in enumerate(VALIDATION.items())
        if name in metrics
    ]
    charts = [
        chart(
            "Loss",
            [
                *noisy("subject", metrics.get("instance_loss", metrics.get("loss", [])), 0),
                *noisy("class", _unless_zero(metrics.get("prior_loss", [])), 1),
            ],
            "of every step, and its mean over a twentieth of the run: noise and timestep make it jump",
        ),
        chart("Validation", validation, "loss on fixed pictures at fixed noises, as a ratio to the base model's"),
        chart("Learning rate", [Curve("learning rate", metrics.get("lr", []), 0)]),
        chart("Memory", [Curve("peak so far", peak, 0)], "GiB; on a CPU, of the whole process", from_zero=True),
        chart("Seconds a step", noisy("seconds", metrics.get("seconds", []), 0), from_zero=True),
    ]
    return element("div", charts, class_="charts") if any(charts) else None


def _unless_zero(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Without prior preservation its loss is zero throughout."""
    return points if any(value for _, value in points) else []


def identifier(story: Story) -> Html | None:
    """What the model's text encoders made of the word before it was trained."""
    if not story.identifier:
        return None
    titles = ("token", "number", "rarer than", "nearest words", "read by")
    head = element("tr", *(element("th", text, scope="col") for text in titles))
    rows = [
        element(
            "tr",
            element("th", foreign(token.text, 80), scope="row"),
            element("td", str(token.number)),
            element("td", f"{token.rarity:.0%} of the vocabulary"),
            element("td", foreign(", ".join(token.near), 200)),
            element("td", foreign(token.part, 80)),
        )
        for token in story.tokens
    ]
    table = element("table", element("thead", head), element("tbody", rows))
    return element("div", element("p", foreign(story.identifier)), wide("Tokens of the identifier", table))


def memory(story: Story) -> Html | None:
    """What the plan said of each phase beside what was measured."""
    if not story.phases:
        return None
    largest = max([story.budget or 0, *(value or 0 for _, *values in story.phases for value in values)])
    head = element("tr", *(element("th", text, scope="col") for text in ("phase", "predicted", "measured")))
    rows = [
        element(
            "tr",
            element("th", foreign(name, 80), scope="row"),
            _bar(predicted, largest, f"{name}, predicted"),
            _bar(measured, largest, f"{name}, measured"),
        )
        for name, predicted, measured in story.phases
    ]
    inside = f"inside {gib(story.budget)}" if story.budget else "no budget was given"
    said = filter(None, [shortened(story.strategy, 80), inside])
    return element(
        "div",
        element("p", "; ".join(said)),
        wide("Memory by phase", element("table", element("thead", head), element("tbody", rows))),
        element("p", "Predicted: what PyTorch's allocator gives out on a GPU. Measured: that, or on a CPU the most "
                     "that the whole process has taken so far.", class_="soft"),
    )  # fmt: skip


def _bar(value: float | None, largest: float, what: str) -> Html:
    if value is None:
        return element("td", "–")
    label = f"{shortened(what, 80)}: {gib(value)}"
    return element(
        "td", element("meter", min=0, max=int(largest) or 1, value=int(value), aria_label=label), " ", gib(value)
    )


def reproduction(story: Story) -> Html | None:
    """The settings, and the command that makes this again."""
    if not story.toml:
        return None
    return element(
        "div",
        element("p", "Save this as ", element("code", "again.toml"), ", with another name under ",
                element("code", "[output]"), ", and run ", element("code", "lowvram-db train again.toml"),
                " in the folder that its paths start from. On the same kind of machine with the same versions the "
                "result is the same bit for bit on a CPU."),
        element("pre", shortened(story.toml, _LONGEST_TOML), tabindex=0, dir="auto", aria_label="config.toml",
                role="group"),
    )  # fmt: skip
