"""A page: one file that asks for nothing from anywhere, and in which no script runs but its own."""

import base64
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from lowvram_db.atomic import replacing_file
from lowvram_db.errors import UserError
from lowvram_db.report.markup import Html, element, foreign, joined, shortened

LARGEST = 9_500_000  # bytes, so that it can be sent by mail
_SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15)  # of pictures, until it fits
_BEGINNING = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="lowvram-db'

Section = tuple[str, Html | None]  # heading and content; one without content is left out


def compose(title: str, head: Html, sections: list[Section]) -> str:
    """The whole document."""
    style, script = (files(__package__).joinpath(name).read_text("utf-8") for name in ("style.css", "script.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    shown = [(heading, content) for heading, content in sections if content]
    links = [element("li", element("a", heading, href=f"#{_anchor(heading)}")) for heading, _ in shown]
    body = element(
        "body",
        element("a", "To the content", href="#content", class_="skip"),
        element("header", element("h1", foreign(title, 200)), head),
        element("nav", element("ul", links), aria_label="Parts of this page"),
        element(
            "main",
            [
                element("section", element("h2", heading, id=_anchor(heading)), content,
                        aria_labelledby=_anchor(heading))
                for heading, content in shown
            ],
            id="content",
            tabindex=-1,
        ),
        element("footer", f"Written by lowvram-db {version('lowvram-db')}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."),
        element("script", Html(script)),
    )  # fmt: skip
    rest = joined(
        [
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="color-scheme", content="light dark"),
            element("title", shortened(title, 200)),
            element("style", Html(style)),
        ]
    )
    return f'{_BEGINNING} {version("lowvram-db")}">{rest}</head>{body}</html>\n'


def write_page(path: Path, page: Callable[[float], str]) -> None:
    """Write what `page` makes of a scale of its pictures, at the largest that keeps it under LARGEST bytes.

    Raises UserError where something else is called so, or it cannot be written.
    """
    if not is_ours(path):
        raise UserError(f"{path}: is no report of lowvram-db; move it elsewhere, or choose another name with --out")
    for scale in _SCALES:
        content = page(scale).encode("utf-8")
        if len(content) <= LARGEST:
            break
    with replacing_file(path) as temporary:
        temporary.write_bytes(content)


def is_ours(path: Path) -> bool:
    """Whether there is nothing yet, a page that was written here, or what a power cut has left of one."""
    if not path.exists():
        return True
    try:
        with path.open("rb") as stream:
            beginning = stream.read(len(_BEGINNING))
    except OSError:
        return False
    return beginning == _BEGINNING.encode() or not beginning.strip(b"\0")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def _anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")
