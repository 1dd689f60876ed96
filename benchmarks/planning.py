"""The cost of planning a pass over a very large data set, and of opening 10,000 files.

    python -m benchmarks.planning [--units 10000000 --ranks 4096 --rows 1000000000000 --files 10000]

Plans passes over a number of row groups and rows, as the driver and every rank do, without reading data. Prints the
time and the peak memory of a plan, and the time until a rank at a random step has its first window ("seek"). Every seek
is made twice: the lower of the two times excludes pauses of the machine and cold CPU caches after a plan.

Then opens a source of Parquet files with 10 row groups and 30 columns each, on a local disk: for the first time, and
again with cached footers; compared with `pyarrow.dataset`, which reads all footers each time. Each runs in a new
process, whose memory is the growth of its peak.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import side_by_side
from raykeras.data.plan import PassPlan, default_num_shards

BATCH_SIZE, SEEKS = 1 << 20, 200
COLUMNS, GROUPS, GROUP_ROWS = 30, 10, 10

MEASURE = """
import json, pathlib, sys, time
import pyarrow.dataset, raykeras as rk, raykeras.data.sources.parquet
peak = lambda: int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
before, start = peak(), time.perf_counter()
{open}
print(json.dumps([time.perf_counter() - start, peak() - before, groups]))
"""
RAYKERAS = "groups = len(rk.parquet(sys.argv[1], x=['f0'], y='f1').open().unit_rows)"
PYARROW = """
fragments = list(pyarrow.dataset.dataset(sys.argv[1]).get_fragments())
groups = sum(fragment.metadata.num_row_groups for fragment in fragments)
"""


def plan_and_seek(units: int, ranks: int, rows: int, rounds: int) -> dict[str, Any]:
    """Plan a pass for each round, and seek to random steps of random ranks."""
    rng = np.random.default_rng(0)
    mean = rows // units
    unit_rows = rng.integers(mean // 2, mean + mean // 2, units)
    seconds, seeks, second_seeks = [], [], []
    for epoch in range(rounds):
        start = time.perf_counter()
        plan = PassPlan(unit_rows, global_batch_size=BATCH_SIZE, num_shards=default_num_shards(ranks), epoch=epoch)
        seconds.append(time.perf_counter() - start)
        for _ in range(SEEKS):
            rank, step = int(rng.integers(ranks)), int(rng.integers(plan.num_steps))
            for times in (seeks, second_seeks):
                start = time.perf_counter()
                window = next(plan.windows(rank, ranks, step))
                times.append(1e3 * (time.perf_counter() - start))
                assert window.start <= plan.batch_range(step, rank, ranks)[0] < window.start + window.num_rows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rows": plan.num_rows, "seconds": seconds, "peak_mib": peak, "seek_ms": seeks, "again_ms": second_seeks}


def open_files(folder: Path, cache: Path, program: str, use_cache: bool) -> tuple[float, float]:
    """Return the seconds and the MiB that a program takes to open the files of a folder."""
    if not use_cache:
        (cache / "footers-2.sqlite").unlink(missing_ok=True)
    command = [sys.executable, "-c", MEASURE.format(open=program), str(folder)]
    environment = {**os.environ, "RAYKERAS_CACHE": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    seconds, mib, groups = json.loads(done.stdout)
    assert groups == GROUPS * len(list(folder.iterdir()))
    return seconds, mib


def generate(folder: Path, num_files: int) -> None:
    rng = np.random.default_rng(0)
    table = pa.table({f"f{i}": rng.random(GROUPS * GROUP_ROWS, np.float32) for i in range(COLUMNS)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=GROUP_ROWS)
    content = sink.getvalue().to_pybytes()
    folder.mkdir()
    for i in range(num_files):
        (folder / f"{i:06}.parquet").write_bytes(content)


def main() -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--units", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=10**12)
    parser.add_argument("--files", type=int, default=10_000)
    arguments = parser.parse_args()

    plans = plan_and_seek(arguments.units, arguments.ranks, arguments.rows, arguments.rounds)
    header = (
        "row groups",
        "rows",
        "ranks",
        "plan, s",
        "peak of the process, MiB",
        "seek, ms (median)",
        "(most, lesser of two)",
        "(most)",
    )
    row = (
        f"{arguments.units:,}",
        f"{plans['rows']:,}",
        f"{arguments.ranks:,}",
        f"{np.median(plans['seconds']):.1f}",
        f"{plans['peak_mib']:.0f}",
        f"{np.median(plans['seek_ms']):.2f}",
        f"{max(map(min, plans['seek_ms'], plans['again_ms'])):.2f}",
        f"{max(plans['seek_ms'] + plans['again_ms']):.2f}",
    )
    print(side_by_side.table(header, [row]), flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = Path(temporary) / "data", Path(temporary) / "cache"
        generate(folder, arguments.files)
        kinds = {
            "raykeras, first time": functools.partial(open_files, folder, cache, RAYKERAS, False),
            "raykeras, again": functools.partial(open_files, folder, cache, RAYKERAS, True),
            "pyarrow.dataset, every footer": functools.partial(open_files, folder, cache, PYARROW, True),
        }
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for _ in range(arguments.rounds):
            for name, run in kinds.items():
                figures[name].append(run())
    print(f"\n{arguments.files:,} files\n")
    medians = [(name, *map(statistics.median, zip(*values, strict=True))) for name, values in figures.items()]
    rows = [(name, f"{seconds:.2f}", f"{mib:,.0f}") for name, seconds, mib in medians]
    print(side_by_side.table(("", "s", "MiB"), rows))
    side_by_side.write(arguments.json, {"plan": plans, "metadata": figures})


if __name__ == "__main__":
    main()
