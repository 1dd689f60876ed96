"""Pieces of HTML. Arguments called `text`, `title` and `heads` are escaped; others are HTML already."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from typing import Any

_NOT_IN_HTML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def escaped(text: object) -> str:
    """Return text as HTML; characters that a page must not contain are replaced."""
    return html.escape(_NOT_IN_HTML.sub("\ufffd", str(text)))


def section(title: str, body: str) -> str:
    """Return a section of the page."""
    return f"<section><h2>{escaped(title)}</h2>{body}</section>"


def note(text: str) -> str:
    """Return a remark."""
    return f'<p class="note">{escaped(text)}</p>'


def folded(title: str, body: str) -> str:
    """Return a part that is folded at first."""
    return f"<details><summary>{escaped(title)}</summary>{body}</details>"


def swatch(color: str) -> str:
    """Return a square in the colour of a CSS variable."""
    return f'<span class="swatch" style="background: var({color})"></span>'


def key(items: Sequence[str]) -> str:
    """Return the key of figures."""
    return f'<ul class="key">{"".join(f"<li>{item}</li>" for item in items)}</ul>' if items else ""


def definitions(kind: str, items: Sequence[tuple[str, str]]) -> str:
    """Return names with their values.

    Args:
        kind: CSS class.
        items: Text of each name, and its value as HTML.
    """
    lines = "".join(f"<div><dt>{escaped(name)}</dt><dd>{value}</dd></div>" for name, value in items)
    return f'<dl class="{kind}">{lines}</dl>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str]) -> str:
    """Return a table that scrolls in its own box.

    Args:
        heads: Text of the head of each column.
        rows: Cells as HTML.
        classes: CSS class of each column.
    """
    columns = zip(heads, classes, strict=True)
    head = "".join(f'<th scope="col" class="{kind}">{escaped(text)}</th>' for text, kind in columns)
    lines = []
    for first, *others in rows:
        cells = "".join(f'<td class="{kind}">{cell}</td>' for cell, kind in zip(others, classes[1:], strict=True))
        lines.append(f'<tr><th scope="row" class="{classes[0]}">{first}</th>{cells}</tr>')
    body = "".join(lines)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def json_data(value: Any) -> str:
    """Return JSON that cannot end the script element it is in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def script_hash(script: str) -> str:
    """Return the source expression of a Content-Security-Policy that allows a script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
