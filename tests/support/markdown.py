"""The documentation as files: its pages, their blocks of Python, headings and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAGES = sorted(
    [*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *(ROOT / "docs").rglob("*.md")],
    key=lambda page: page.relative_to(ROOT),
)

_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>setup|not run)(?P<note>.*?)-->\n\n)?"
    r'^```python(?: title="(?P<title>[^"]*)")?\n(?P<code>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of Python in a page.

    Attributes:
        code: The code, on the lines that it has in the page.
        setup: Code that must run before it, which readers of the page do not see.
        runs: Whether it runs by itself, on one machine without network. A block after `<!-- not run: reason -->` does
            not, and one whose title is the name of a file is run by the commands of the tutorial.
    """

    code: str
    setup: str
    runs: bool


def name_of(page: Path) -> str:
    """Return the path of a page in the repository."""
    return str(page.relative_to(ROOT))


def python_blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of Python in a page."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        lines_before = text.count("\n", 0, found.start("code"))
        yield Block(
            code="\n" * lines_before + found["code"],
            setup=found["note"] if found["mark"] == "setup" else "",
            runs=found["mark"] != "not run" and not (found["title"] or "").endswith(".py"),
        )


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the file and the anchor of each link or image of a page that leads into the repository."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'\b(?:src|href)="([^"]+)"', text)
    for target in targets:
        if not re.match(r"\w+:", target):
            file, _, anchor = target.partition("#")
            yield file, anchor


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
