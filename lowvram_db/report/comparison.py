"""Several runs beside each other: settings that differ, curves over each other, their pictures and scores."""

from lowvram_db.report.curves import Curve, chart, smoothed, wide
from lowvram_db.report.markup import Html, element, foreign, shortened
from lowvram_db.report.pictures import choice_of, image, picker, picture_table, step_name
from lowvram_db.report.remarks import remarks
from lowvram_db.report.scores import Evaluation
from lowvram_db.report.story import Point, Story

_MISSING = "–"
_CURVES = {
    "instance_loss": ("Loss on the subject", True),
    "prior_loss": ("Loss on the class", True),
    "validation_subject": ("Validation, photos trained on", False),
    "validation_held_out": ("Validation, photos kept back", False),
    "validation_class": ("Validation, class images", False),
    "lr": ("Learning rate", False),
    "seconds": ("Seconds a step", True),
}


def differing_settings(stories: list[Story]) -> Html:
    """Keys in rows, runs in columns."""
    keys = sorted({key for story in stories for key in story.settings})
    rows = [
        (key, values)
        for key in keys
        if len(set(values := [repr(story.settings[key]) if key in story.settings else _MISSING for story in stories]))
        > 1
    ]
    if not rows:
        return element("p", "They have the same settings.")
    head = element("tr", element("td"), *(element("th", foreign(story.name, 80), scope="col") for story in stories))
    body = [
        element("tr", element("th", foreign(key, 80), scope="row"), *(element("td", foreign(v, 500)) for v in values))
        for key, values in rows
    ]
    return wide("Settings that differ", element("table", element("thead", head), element("tbody", body)))


def curves_of_all(stories: list[Story]) -> Html | None:
    """One chart a metric, one curve a run."""
    charts = [
        chart(
            title,
            [
                Curve(shortened(story.name, 80), _points(story, name, jumps), colour)
                for colour, story in enumerate(stories)
            ],
            "its mean over a twentieth of the run" if jumps else "",
        )
        for name, (title, jumps) in _CURVES.items()
    ]
    return element("div", charts, class_="charts") if any(charts) else None


def _points(story: Story, name: str, jumps: bool) -> list[Point]:
    points = story.metrics.get(name, [])
    if not any(value for _, value in points):
        return []
    return smoothed(points) if jumps else points


def pictures_of_all(stories: list[Story], scale: float) -> Html | None:
    """The last pictures of every run, for each prompt, guidance scale and seed that one of them has."""
    last = [story.pictures[max(story.pictures)] if story.pictures else {} for story in stories]
    wanted = list(dict.fromkeys(drawn for pictures in last for drawn in pictures))
    if not wanted:
        return None
    columns = [
        element("span", foreign(story.name, 80), f", {step_name(max(story.pictures))}" if story.pictures else "")
        for story in stories
    ]
    tables = []
    for choice in dict.fromkeys(map(choice_of, wanted)):
        rows = [
            (
                foreign(drawn.prompt),
                [
                    image(pictures[drawn], f"{shortened(story.name, 80)}: {shortened(drawn.prompt, 160)}", scale / 2)
                    if drawn in pictures
                    else element("span", _MISSING)
                    for story, pictures in zip(stories, last, strict=True)
                ],
            )
            for drawn in wanted
            if choice_of(drawn) == choice
        ]
        label = f"Last pictures, guidance and seed {choice}"
        tables.append(element("div", picture_table(label, columns, rows), data_choice=choice))
    return element("div", picker(wanted), tables)


def scores_of_all(stories: list[Story], evaluations: list[Evaluation | None]) -> Html | None:
    """Of every run the recommended step."""
    rows = [
        (story, evaluation, evaluation.best)
        for story, evaluation in zip(stories, evaluations, strict=True)
        if evaluation and evaluation.best
    ]
    if not rows:
        return None
    names = list(dict.fromkeys(name for _, _, best in rows for name in best.values))
    head = ["run", "step", *(name.replace("_", " ") for name in names), "judged by"]
    body = [
        element(
            "tr",
            element("th", foreign(story.name, 80), scope="row"),
            element("td", f"{best.step:,}"),
            *(element("td", str(best.values.get(name, _MISSING))) for name in names),
            element("td", foreign(evaluation.backbone, 200)),
        )
        for story, evaluation, best in rows
    ]
    table = element(
        "table",
        element("thead", element("tr", *(element("th", text, scope="col") for text in head))),
        element("tbody", body),
    )
    return wide("Scores of the recommended steps", table)


def remarks_on_all(stories: list[Story], evaluations: list[Evaluation | None]) -> Html | None:
    said = [
        element("li", element("strong", foreign(story.name, 80)), ": ", foreign(remark))
        for story, evaluation in zip(stories, evaluations, strict=True)
        for remark in remarks(story, evaluation)
    ]
    return element("ul", said, class_="warnings") if said else None
