"""The throughput of reads that take a second, as from remote storage, and the cost of a change of executions.

    python -m benchmarks.latency

Streams Parquet through a `transform` that sleeps for a second, on a Ray with 16 logical CPUs, even if the machine has
fewer. The ideal is 16 tables per second. A consumer that takes tables at once shows how many CPUs wait for storage; one
that takes a table every 100 ms shows how long it waits. A Ray Data execution has 512 tasks by default; with 64,
executions change more often. "Ahead" is the number of started tasks whose tables have not been taken; 18 are allowed.
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
from raykeras.compat.ray_data import ReadLimits
from raykeras.data.plan import PassPlan, Window
from raykeras.data.resolve import resolve
from raykeras.data.streaming import reader

CPUS, WAIT_S, WARM_UP, TABLES = 16, 1.0, 128, 192
GROUP_ROWS, NUM_GROUPS = 1 << 18, 16
CASES = ((512, 0.0), (64, 0.0), (512, 0.1), (64, 0.1))


def slow_transform(columns: dict[str, np.ndarray], log: Path) -> dict[str, np.ndarray]:
    """Append a byte to a file, and sleep."""
    with log.open("a") as file:
        file.write(".")
    time.sleep(WAIT_S)
    return columns


def measure(folder: Path, segment_tasks: int, taken_each_s: float) -> dict[str, float]:
    """Return the figures of `TABLES` tables, after a warm-up in which all reading processes start.

    Args:
        folder: Folder of the file.
        segment_tasks: Tasks of a Ray Data execution.
        taken_each_s: Seconds between the tables that the consumer takes; 0 for at once.
    """
    import ray

    log = folder / "started"  # one byte per started task
    source = rk.parquet(folder / "x.parquet", x="x", transform=functools.partial(slow_transform, log=log))
    opened = source.open()
    batch_spec = resolve(source, opened)
    reader.SEGMENT_TASKS, reader.SEGMENT_PASSES = segment_tasks, segment_tasks
    reader.TASK_NBYTES = GROUP_ROWS * batch_spec.row_nbytes

    def windows() -> Iterator[tuple[int, Window]]:
        for epoch in itertools.count():
            plan = PassPlan(opened.unit_rows, global_batch_size=1 << 10, window_rows=GROUP_ROWS, epoch=epoch)
            yield from ((epoch, window) for window in plan.windows(0, 1))

    ray.init(num_cpus=CPUS, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    log.write_text("")
    limits = ReadLimits(cpus=CPUS, store_nbytes=(CPUS + 2) * reader.TASK_NBYTES)
    tasks = reader.gather_tasks(windows(), opened, batch_spec.row_nbytes)
    stream = reader.ray_blocks(opened.reader, batch_spec, tasks, limits)
    waits, ahead, start = [0.0], [0], 0.0
    for number in range(WARM_UP + TABLES):
        if number == WARM_UP:
            waits, ahead, start = [], [], time.perf_counter()
        wait_start = time.perf_counter()
        next(stream)
        waits.append(time.perf_counter() - wait_start)
        ahead.append(log.stat().st_size - number - 1)
        time.sleep(taken_each_s)
    seconds = time.perf_counter() - start
    stream.close()
    ray.shutdown()
    return {"tables_per_s": TABLES / seconds, "waited": sum(waits), "longest": max(waits), "ahead": max(ahead)}


def main() -> None:
    parser = side_by_side.parser(__doc__)
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        x = np.random.default_rng(0).random(NUM_GROUPS * GROUP_ROWS, np.float32)
        pq.write_table(pa.table({"x": x}), folder / "x.parquet", row_group_size=GROUP_ROWS)
        for tasks, each_s in CASES:
            figures = side_by_side.alone(functools.partial(measure, folder, tasks, each_s))
            results.append({"segment_tasks": tasks, "taken_each_s": each_s, **figures})
    header = ("tasks per execution", "taken", "tables/s", "waited, s", "longest wait, s", "most ahead")
    rows = [
        (
            r["segment_tasks"],
            f"every {r['taken_each_s']:g} s" if r["taken_each_s"] else "at once",
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
    from benchmarks import latency  # so that other processes unpickle functions from this module, not `__main__`

    latency.main()
