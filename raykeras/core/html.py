"""Small pieces of HTML for notebooks. All text is escaped, and credentials in URLs are not shown."""

from __future__ import annotations

import html
from collections.abc import Sequence

from raykeras.core.errors import printable


def line(text: str) -> str:
    """Return a line of text in a monospaced font."""
    return f'<div style="font-family: monospace; white-space: pre-wrap">{_escaped(text)}</div>'


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, bold: int | None = None, is_text: bool = False
) -> str:
    """Return a table.

    Args:
        header: Names of the columns.
        rows: The cells of each row.
        bold: Index of a row to set in bold.
        is_text: Whether the cells are texts, which begin at the left; Jupyter aligns cells at the right.
    """
    style = ' style="text-align: left"' if is_text else ""
    lines = [_row("", "th", header, style)]
    for index, row in enumerate(rows):
        lines.append(_row(' style="font-weight: bold"' if index == bold else "", "td", row, style))
    return f"<table>{''.join(lines)}</table>"


def _row(row_style: str, tag: str, cells: Sequence[str], style: str) -> str:
    return f"<tr{row_style}>{''.join(f'<{tag}{style}>{_escaped(cell)}</{tag}>' for cell in cells)}</tr>"


def _escaped(text: str) -> str:
    return html.escape(printable(text))
