"""The commands of the tutorial run as written."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support import tutorial


def test_commands_print_what_the_page_shows(tmp_path: Path) -> None:
    page = tutorial.PAGE.read_text()
    assert first_words(tutorial.transcript(page, tmp_path)) == first_words(page)
    assert (tmp_path / "first.html").exists()


def first_words(page: str) -> list[str]:
    """Return the first word of each line, without figures, which differ between machines."""
    return [re.sub(r"[\d.,%]+", "0", line.split(" ")[0]) for line in page.splitlines()]
