"""Reads that take a second, as of storage far away: how many are under way, and what it costs when executions change.

    python -m benchmarks.latency

Streams Parquet through a `transform` that sleeps for a second, on a Ray of 16 CPUs that the machine need not have. 16
tables a second are ideal. What is taken at once shows how many CPUs wait for storage; what is taken each 100 ms, how
long its consumer is kept waiting. Ray Data executions have 512 tasks, and here also 64, of which one follows another.
`ahead` are tasks begun whose table was not taken: 18 are allowed.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import raykeras as rk
from benchmarks import side_by_side
from raykeras import blocks
from raykeras.plan import PassPlan, Window
from raykeras.reads import Reading
from raykeras.specs import resolve

CPUS, WAIT_S, WARM_UP, TABLES = 16, 1.0, 128, 192
GROUP_ROWS, NUM_GROUPS = 1 << 18, 16
CASES = ((512, 0.0), (64, 0.0), (512, 0.1), (64, 0.1))


def waits(columns: dict[str, np.ndarray], begun: Path) -> dict[str, np.ndarray]:
    with begun.open("a") as file:
        file.write(".")
    time.sleep(WAIT_S)
    return columns


def measured(folder: Path, segment_tasks: int, taken_each_s: float) -> dict[str, float]:
    """Of some tables, once all processes that read have started."""
    import ray

    begun = folder / "begun"
    source = rk.parquet(folder / "x.parquet", x="x", transform=functools.partial(waits, begun=begun))
    opened = source.open()
    layout = resolve(source, opened)
    blocks.SEGMENT_TASKS, blocks.SEGMENT_PASSES = segment_tasks, segment_tasks
    blocks.TASK_NBYTES = GROUP_ROWS * layout.row_nbytes

    def windows() -> Iterator[tuple[int, Window]]:
        for epoch in itertools.count():
            plan = PassPlan(opened.unit_rows, global_batch_size=1 << 10, window_rows=GROUP_ROWS, epoch=epoch)
            yield from ((epoch, window) for window in plan.windows(0, 1))

    ray.init(num_cpus=CPUS, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    begun.write_text("")
    limits = Reading(cpus=CPUS, store_nbytes=(CPUS + 2) * blocks.TASK_NBYTES)
    tasks = blocks.gather_tasks(windows(), opened, layout.row_nbytes)
    stream = blocks.ray_blocks(opened.reader, layout, tasks, limits)
    waited, ahead, first = [0.0], [0], 0.0
    for taken in range(WARM_UP + TABLES):
        if taken == WARM_UP:
            waited, ahead, first = [], [], time.perf_counter()
        asked = time.perf_counter()
        next(stream)
        waited.append(time.perf_counter() - asked)
        ahead.append(begun.stat().st_size - taken - 1)
        time.sleep(taken_each_s)
    seconds = time.perf_counter() - first
    stream.close()
    ray.shutdown()
    return {"tables_per_s": TABLES / seconds, "waited": sum(waited), "longest": max(waited), "ahead": max(ahead)}


def main() -> None:
    parser = side_by_side.parser(__doc__)
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        x = np.random.default_rng(0).random(NUM_GROUPS * GROUP_ROWS, np.float32)
        pq.write_table(pa.table({"x": x}), folder / "x.parquet", row_group_size=GROUP_ROWS)
        for tasks, each_s in CASES:
            figures = side_by_side.alone(functools.partial(measured, folder, tasks, each_s))
            results.append({"segment_tasks": tasks, "taken_each_s": each_s, **figures})
    header = ("tasks an execution", "taken", "tables/s", "waited, s", "at most, s", "ahead, at most")
    rows = [
        (
            r["segment_tasks"],
            f"each {r['taken_each_s']:g} s" if r["taken_each_s"] else "at once",
            f"{r['tables_per_s']:.1f}",
            f"{r['waited']:.1f}",
            f"{r['longest']:.2f}",
            r["ahead"],
        )
        for r in results
    ]
    print(side_by_side.table(header, rows))
    side_by_side.write(arguments.json, results)


if __name__ == "__main__":
    from benchmarks import latency  # by whose name other processes find what is sent to them

    latency.main()
