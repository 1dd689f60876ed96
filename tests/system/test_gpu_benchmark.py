"""`benchmarks.gpu` on logical CPU devices."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import gpu
from tests.support.fork_server import ForkServer


def test_tables_are_written(forked: ForkServer, tmp_path: Path) -> None:
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text(f"before\n\n{gpu.START}\nold\n{gpu.END}\n\nafter\n")
    command = ["--cpus=2", "--small", "--steps=4", f"--write={page}", f"--json={figures}"]
    ended = forked.run(gpu.main, command)
    assert ended.exit_code == 0, ended.output  # training on one and on two devices is exact
    text = page.read_text()
    assert text.startswith("before\n\n") and text.endswith("\n\nafter\n") and "old" not in text
    assert "too large" not in text
    measured = json.loads(figures.read_text())["measured"]
    for name, unit in (("convolution", "images"), ("small transformer", "tokens")):
        assert f"| {name} | CPUs | {unit}/s | ÷ one CPU | waiting for data | checkpoint, ms |" in text
        trainings = [f"raykeras, {rows}, {count} CPU" for rows in ("synthetic", "Parquet") for count in (1, 2)]
        assert list(measured[name]) == ["plain `Model.fit`, synthetic, 1 CPU", *trainings]
        assert all(values["rows_per_s"] > 0 for values in measured[name].values())
