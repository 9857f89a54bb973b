"""HTML, put together so that nothing which is not made here can be markup: every other text is escaped where it joins.

Elements are made by `element`; what it returns is Html, and only that is taken as it is.
"""

import re
from collections.abc import Iterable
from html import escape

_VOID = {"br", "img", "input", "link", "meta"}  # that have no end tag
# What no HTML document may have in it, be it escaped: control characters, halves of surrogate pairs, noncharacters.
_FORBIDDEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\ufdd0-\\ufdef"
    + "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0, 0x110000, 0x10000))
    + "]"
)


class Html(str):
    """Markup that is safe as it is."""

    __slots__ = ()


Child = str | None | Iterable["Child"]
Attribute = str | int | float | bool | None


def element(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """One element. In the names of attributes an underscore stands for a hyphen, and one at the end for nothing; True
    gives an attribute without a value, None and False none at all."""
    told = "".join(_attribute(key, value) for key, value in attributes.items())
    return Html(f"<{name}{told}>" if name in _VOID else f"<{name}{told}>{joined(children)}</{name}>")


def joined(children: Child) -> Html:
    """Several after each other; None is nothing."""
    if children is None or isinstance(children, Html):
        return children or Html()
    if isinstance(children, str):
        return Html(escape(plain(children)))
    return Html("".join(map(joined, children)))


def foreign(text: str, longest: int = 2000) -> Html:
    """What a stranger wrote, in whatever direction it is read; cut off where it is long."""
    return element("bdi", shortened(text, longest))


def shortened(text: str, longest: int) -> str:
    """The beginning of a text that has more than so many characters."""
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text):,} characters)"


def plain(text: str) -> str:
    """A text without what HTML cannot hold, which becomes U+FFFD; lines end in line feeds."""
    if text.isascii() and text.isprintable():  # as pictures are, which are long
        return text
    return _FORBIDDEN.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.removesuffix("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(plain(str(value)))}"'
