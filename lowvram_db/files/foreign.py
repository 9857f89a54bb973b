"""Content that others have written, and that may be anything: whatever is wrong with it is said of its file."""

import contextlib
import json
import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowvram_db.errors import UserError


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object from a model folder, every number in it finite. Raises UserError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; {why}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


@contextlib.contextmanager
def naming(path: Path, meaning: str) -> Iterator[None]:
    """Whatever a library raises over the content of a model's file becomes a UserError: the file, what that means, and
    the library's words. To be used where content that nobody foresaw can end in any exception."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        words = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        raise UserError(f"{path}: {meaning} ({words})") from error
