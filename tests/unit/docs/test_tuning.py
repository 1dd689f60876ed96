"""The versions on the page on tuning are the pinned ones."""

from __future__ import annotations

import re

from tests.support.markdown import ROOT


def test_documented_versions_are_pinned() -> None:
    page = (ROOT / "docs" / "guides" / "tuning.md").read_text()
    versions = re.findall(r"^\| ([a-z-]+)(?:\[\w+\])? \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(versions) == 3
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert {f"{package}=={version}" for package, version in versions} <= set(pins)
