"""Small pieces of HTML for notebooks. All text is escaped, and credentials in URLs are not shown."""

from __future__ import annotations

import html
from collections.abc import Sequence

from raykeras.core.errors import printable


def line(text: str) -> str:
    """Return a line of text in a monospaced font."""
    return f'<div style="font-family: monospace; white-space: pre-wrap">{_escaped(text)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], bold: int | None = None) -> str:
    """Return a table.

    Args:
        header: Names of the columns.
        rows: The cells of each row.
        bold: Index of a row to set in bold.
    """
    lines = [_row(header, "th")]
    lines += [_row(row, "td", ' style="font-weight: bold"' if index == bold else "") for index, row in enumerate(rows)]
    return f"<table>{''.join(lines)}</table>"


def _row(cells: Sequence[str], tag: str, style: str = "") -> str:
    return f"<tr{style}>{''.join(f'<{tag}>{_escaped(cell)}</{tag}>' for cell in cells)}</tr>"


def _escaped(text: str) -> str:
    return html.escape(printable(text))
