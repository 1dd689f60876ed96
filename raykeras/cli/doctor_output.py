"""What `raykeras doctor` prints: a table of checks with remedies, or JSON."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raykeras.core.errors import printable_line
from raykeras.doctor.checks import FAIL, PASS, WARN, Check

_STYLES = {PASS: "green", WARN: "yellow", FAIL: "bold red"}


def status_of(found: Sequence[Check]) -> str:
    """Return the worst status."""
    statuses = {check.status for check in found}
    return FAIL if FAIL in statuses else WARN if WARN in statuses else PASS


def checks_json(found: Sequence[Check]) -> dict[str, Any]:
    """Return the checks as JSON values."""
    return {"status": status_of(found), "checks": [dataclasses.asdict(check) for check in found]}


def show_checks(found: Sequence[Check]) -> None:
    """Print all checks of this machine and the cluster; of each node, the passed ones in one line."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for node, group in itertools.groupby(sorted(found, key=lambda check: check.node), key=lambda check: check.node):
        checks = list(group)
        if node:
            table.add_row()
            table.add_row("", "node", Text(printable_line(node), style="bold"))
            names = [check.name for check in checks if check.status == PASS]
            if names:
                table.add_row(_status(PASS), f"{len(names)} checks", ", ".join(names))
        for check in checks:
            if not node or check.status != PASS:
                _add(table, check)
    console.print(table)
    counts = {status: sum(check.status == status for check in found) for status in _STYLES}
    console.print(f"\n{counts[PASS]} passed, {counts[WARN]} warned, {counts[FAIL]} failed")


def _add(table: Table, check: Check) -> None:
    table.add_row(_status(check.status), check.name, Text(printable_line(check.found)))
    if check.remedy:
        table.add_row("", "", Text(f"→ {printable_line(check.remedy)}"))


def _status(status: str) -> Text:
    return Text(status, style=_STYLES[status])
