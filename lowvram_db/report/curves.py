"""Curves over steps: lines in SVG that stretch to the page's width, their scales in text that does not."""

import json
import math
from dataclasses import dataclass
from itertools import groupby

from lowvram_db.report.markup import Html, element, shortened
from lowvram_db.report.story import Point

_POINTS = 300  # of a curve: as many as a page is wide
_WIDTH, _HEIGHT = 1000, 300  # of the drawing, in its own units
_TICKS = 5
_SMOOTHED_OVER = 20  # parts of a run that a mean goes over
_ROWS = 6  # of the table of figures
COLOURS = 8  # of style.css


@dataclass(frozen=True)
class Curve:
    """One line of a chart; of a faint one nothing is said in figures."""

    label: str
    points: list[Point]
    colour: int
    faint: bool = False


def noisy(label: str, points: list[Point], colour: int) -> list[Curve]:
    """A curve that jumps from step to step, faint, and its mean over a twentieth of the run."""
    return [Curve(label, points, colour, faint=True), Curve(label, smoothed(points), colour)]


def smoothed(points: list[Point]) -> list[Point]:
    """The mean of each point and those before it, over a twentieth of all."""
    window = max(1, len(points) // _SMOOTHED_OVER)
    values = [value for _, value in points]
    return [
        (step, math.fsum(part := values[max(0, place + 1 - window) : place + 1]) / len(part))
        for place, (step, _) in enumerate(points)
    ]


def thinned(points: list[Point]) -> list[Point]:
    """No more points than can be seen: means, each at its last step."""
    if len(points) <= _POINTS:
        return points
    numbered = groupby(enumerate(points), key=lambda place: place[0] * _POINTS // len(points))
    parts = [[point for _, point in part] for _, part in numbered]
    return [(part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in parts]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers at even distances, the first at or below `low`, the last at or above `high`."""
    if high <= low:
        high, low = high + (abs(high) / 2 or 1.0), low - (abs(low) / 2 or 1.0)
    rough = (high - low) / (_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [number * distance for number in range(first, last + 1)]


def chart(title: str, curves: list[Curve], remark: str = "", *, from_zero: bool = False) -> Html | None:
    """A chart with its scales, its values at any step, and some of them as a table; None where there is nothing to
    draw. from_zero: whether the scale of the values begins there, so that heights compare."""
    drawn = [Curve(c.label, thinned(c.points), c.colour, c.faint) for c in curves if c.points]
    if not drawn:
        return None
    steps = [step for curve in drawn for step, _ in curve.points]
    first, last = min(steps), max(steps)
    values = [value for curve in drawn for _, value in curve.points]
    scale = ticks(0.0 if from_zero else min(values), max(values))
    told = [curve for curve in drawn if not curve.faint]
    data = [{"label": shortened(curve.label, 60), "points": curve.points} for curve in told]
    return element(
        "figure",
        element("figcaption", element("strong", title), f" {remark}" if remark else None),
        element("ul", [_key(curve) for curve in told], class_="key") if len(told) > 1 else None,
        element(
            "div",
            element("div", [element("span", _figure(tick)) for tick in reversed(scale)], class_="ticks-y"),
            _drawing(title, drawn, first, last, scale),
            element("div", [element("span", f"{step:,}") for step in _even(first, last)], class_="ticks-x"),
            class_="plot",
        ),
        element(
            "div",
            element("label", "Step ", element("input", type="range", min=first, max=last, value=last)),
            element("output"),
            class_="scrub",
            hidden=True,
        ),
        _table(title, told),
        class_="chart",
        data_first=first,
        data_last=last,
        data_curves=json.dumps(data),
    )


def _key(curve: Curve) -> Html:
    return element("li", element("span", class_=f"line colour-{curve.colour % COLOURS}"), element("bdi", curve.label))


def _drawing(title: str, curves: list[Curve], first: int, last: int, scale: list[float]) -> Html:
    low, high = scale[0], scale[-1]

    def place(step: int, value: float) -> str:
        across = (step - first) / max(1, last - first) * _WIDTH
        return f"{across:.1f},{(high - value) / (high - low) * _HEIGHT:.1f}"

    lines = [f"M0,{place(first, tick).partition(',')[2]}H{_WIDTH}" for tick in scale]
    paths = [
        # A point by itself is a line of no length, which round ends make visible.
        _path(
            "M" + "L".join(place(*point) for point in (curve.points * 2 if len(curve.points) == 1 else curve.points)),
            f"colour-{curve.colour % COLOURS}" + (" faint" if curve.faint else ""),
        )
        for curve in curves
    ]
    said = "; ".join(
        f"{shortened(curve.label, 60)} from {_figure(curve.points[0][1])} to {_figure(curve.points[-1][1])}"
        for curve in curves
        if not curve.faint
    )
    return element(
        "svg",
        _path("".join(lines), "grid"),
        paths,
        _path(f"M0,0V{_HEIGHT}", "cursor"),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{title}, steps {first} to {last}: {said}",
    )


def _path(d: str, class_: str) -> Html:
    return element("path", d=d, class_=class_, vector_effect="non-scaling-stroke")


def _table(title: str, curves: list[Curve]) -> Html:
    steps = sorted({step for curve in curves for step, _ in curve.points})
    chosen = sorted({steps[round(place * (len(steps) - 1) / (_ROWS - 1))] for place in range(_ROWS)})
    values = [dict(curve.points) for curve in curves]
    head = element("tr", *(element("th", text, scope="col") for text in ["step", *(curve.label for curve in curves)]))
    rows = [
        element(
            "tr",
            element("th", f"{step:,}", scope="row"),
            *(element("td", _figure(of[step]) if step in of else "") for of in values),
        )
        for step in chosen
    ]
    table = element(
        "table", element("caption", f"{title} at some steps"), element("thead", head), element("tbody", rows)
    )
    return element("details", element("summary", "Figures"), wide(f"{title} at some steps", table))


def wide(label: str, content: Html) -> Html:
    """What may be wider than a phone, and is then moved sideways, by keys too."""
    return element("div", content, class_="wide", role="group", aria_label=shortened(label, 80), tabindex=0)


def _even(first: int, last: int) -> list[int]:
    places = min(_TICKS, last - first + 1)
    return [first + round(place * (last - first) / max(1, places - 1)) for place in range(places)]


def _figure(value: float) -> str:
    return f"{value:.4g}"
