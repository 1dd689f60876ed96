"""The code of the README and of the documentation runs as written."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from tests.support.markdown import PAGES, ROOT, name_of, python_blocks


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.runs for b in python_blocks(page))], ids=name_of)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        for block in python_blocks(page):
            if block.runs:
                exec(block.setup, names)
                exec(compile(block.code, name_of(page), "exec"), names)
    if page == ROOT / "README.md":
        assert "Epoch 3/3" in shown.getvalue()
        assert "checkpoints/epoch-0000" in shown.getvalue()
