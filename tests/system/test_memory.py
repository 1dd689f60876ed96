"""A worker's memory does not grow with the size of the data."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.memory import LARGE, SMALL, peak_mib, write
from tests.support.fork_server import ForkServer


def measure(*folders: str) -> None:
    for folder in folders:
        print(json.dumps(peak_mib(Path(folder), epochs=2)), flush=True)


def test_memory_is_independent_of_file_size(forked: ForkServer, tmp_path: Path) -> None:
    """A worker's own memory grows by less than 100 MiB, and by less than 300 with the rows that are read ahead.

    The file is 100 times as large, 484 MiB more. How much is read ahead depends on how busy the machine is.
    """
    folders = {num_rows: tmp_path / str(num_rows) for num_rows in (SMALL, LARGE)}
    assert LARGE == 100 * SMALL
    for num_rows, folder in folders.items():
        write(folder / "0.parquet", num_rows)
    ended = forked.run(measure, *map(str, folders.values()))
    assert ended.exit_code == 0, ended.output
    small, large = (json.loads(line) for line in ended.output.splitlines() if line.startswith("{"))
    assert large["private"] - small["private"] < 100
    assert large["private"] + large["shared"] - small["private"] - small["shared"] < 300
