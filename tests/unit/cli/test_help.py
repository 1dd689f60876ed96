"""Each command explains itself on one screen."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from raykeras.cli.main import main

MAX_LINES = 50


@pytest.mark.parametrize("command", sorted(main.commands))
def test_help_has_one_example_and_fits_a_screen(command: str) -> None:
    lines = CliRunner().invoke(main, [command, "--help"]).output.splitlines()
    assert sum(line.strip().startswith(f"raykeras {command} ") for line in lines) == 1
    assert len(lines) <= MAX_LINES
