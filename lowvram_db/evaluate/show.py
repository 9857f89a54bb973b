"""An evaluation as a table for people."""

from collections.abc import Iterator
from typing import Any

_COLUMNS = {
    "subject": "subject",
    "prompt": "prompt",
    "class_likeness": "class like it",
    "class_diversity": "diversity",
    "memorised": "memorised",
}


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Scores by step, each with half of its 95% interval, and what is recommended."""
    yield f"judged by {result['backbone']}, compared with {result['photos']} {result['compared_with']}"
    yield f"{'step':>8}  " + "".join(f"{title:>16}" for title in _COLUMNS.values())
    yield f"{'base':>8}  {_row(result['base'])}"
    for one in result["checkpoints"]:
        yield f"{one['step']:>8}  {_row(one['scores'])}  {', '.join(one['findings'])}".rstrip()
    yield f"{'photos':>8}  {result['photos_similarity']:>16.3f}"
    yield f"recommended: {result['recommended']['path']}: {result['recommended']['reason']}"


def _row(scores: dict[str, Any]) -> str:
    return "".join(f"{_cell(scores[name]):>16}" for name in _COLUMNS)


def _cell(value: dict[str, float | None] | None) -> str:
    if value is None:
        return "-"
    high, mean = value["high"], value["mean"]
    return f"{mean:.3f}" if high is None or mean is None else f"{mean:.3f} ± {high - mean:.3f}"
