"""The throughput of streams for ranks whose steps take 50 ms, and the number of times that a row group is decoded.

    python -m benchmarks.feed

Runs 1, 2, 4 and 8 ranks, each a process that takes its shard of every batch and sleeps for 50 ms. The data is 2,000,000
rows of 28 float32 features, a label and a weight in Parquet, streamed and shuffled. A rank gets 1,024 or 8,192 rows of
every batch. The ideal is one batch every 50 ms. The CPU utilisation shows whether the machine is the limit. "Decoded"
is the number of row groups that all ranks read in an epoch, relative to the number of row groups.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import raykeras as rk
from benchmarks import side_by_side
from benchmarks.ingest import CASES, generate
from raykeras.data.inputs import open_data, train_spec
from raykeras.data.streaming.dataset import Stream
from raykeras.data.streaming.interleave import RankInput
from raykeras.data.streaming.reader import gather_tasks
from raykeras.data.streaming.resources import CpuBudget, reading
from raykeras.data.streaming.spec import RowsSpec
from raykeras.driver.cluster import connect

STEP_S, SECONDS, RANK_ROWS = 0.05, 20.0, (1_024, 8_192)


def spec_for(folder: Path, batch_size: int) -> RowsSpec:
    """Return the spec of the training data, with 8 shards."""
    data = open_data(rk.parquet(str(folder), **CASES["narrow"].options, cache=None), None, None, "float32")
    options: dict[str, Any] = {"class_weight": None, "steps_per_epoch": None, "seed": 0, "floatx": "float32"}
    spec = train_spec(data, batch_size=batch_size, shuffle=True, scale=rk.Scale(), **options)
    assert isinstance(spec, RowsSpec)
    return dataclasses.replace(spec, num_shards=8)


def take(spec: RowsSpec, rank: int, num_ranks: int, start: float) -> int:
    """Return the number of rows that one rank takes in `SECONDS` from `start`, in seconds since the epoch."""
    limits = reading(CpuBudget(0.1), num_ranks, 1)
    stream = Stream(RankInput(spec.opened, spec.batch_spec, spec.plan, rank, num_ranks, 1, reading=limits))
    batches = iter(stream.endless_dataset())
    next(batches)
    time.sleep(max(0.0, start - time.time()))
    rows, due = 0, time.time()
    while due < start + SECONDS:
        batch = next(batches)
        rows += len((batch[0] if num_ranks > 1 else batch)[1])
        due = max(due + STEP_S, time.time())  # a step starts once the previous one has ended and its batch is ready
        time.sleep(max(0.0, due - time.time()))
    stream.close()
    return rows


def cpu_ticks() -> tuple[float, float]:
    """Return the busy and the total time of all CPUs since boot, in clock ticks."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    ticks = [int(value) for value in fields]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def measure(folder: Path, rank_rows: int, num_ranks: int) -> dict[str, float]:
    """Stream to a number of ranks, and return the figures of a row of the table."""
    import ray

    spec = spec_for(folder, rank_rows * num_ranks)
    start = time.time() + 15 + 8 * num_ranks  # every rank imports TensorFlow first
    remote = ray.remote(num_cpus=0.1)(take)
    ranks = [remote.remote(spec, rank, num_ranks, start) for rank in range(num_ranks)]
    time.sleep(max(0.0, start - time.time()))
    busy, total = cpu_ticks()
    rows = sum(ray.get(ranks))
    busy, total = (b - a for a, b in zip((busy, total), cpu_ticks(), strict=True))
    plan = spec.plan(0)
    decoded = 0
    for rank in range(num_ranks):
        windows = ((0, window) for window in plan.windows(rank, num_ranks))
        decoded += sum(len(task.units) for task in gather_tasks(windows, spec.opened, spec.batch_spec.row_nbytes))
    ideal = num_ranks * rank_rows / STEP_S
    return {
        "rows_per_s": rows / SECONDS,
        "of_ideal": rows / SECONDS / ideal,
        "cpu": busy / total,
        "decoded": decoded / len(spec.opened.unit_rows),
    }


def main() -> None:
    parser = side_by_side.parser(__doc__)
    arguments = parser.parse_args()
    connect(rk.Scale(workers=8, cpus_per_worker=0.1), in_process=False)
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "narrow"
        generate(CASES["narrow"], folder)
        for rank_rows in RANK_ROWS:
            for num_ranks in (1, 2, 4, 8):
                run = functools.partial(measure, folder, rank_rows, num_ranks)
                results[f"{rank_rows} × {num_ranks}"] = run()
    header = ("rows per rank and batch × ranks", "rows/s", "of the ideal", "CPU", "decoded")
    rows = [
        (name, f"{r['rows_per_s']:,.0f}", f"{r['of_ideal']:.1%}", f"{r['cpu']:.0%}", f"{r['decoded']:.2f}")
        for name, r in results.items()
    ]
    print(side_by_side.table(header, rows))
    side_by_side.write(arguments.json, results)


if __name__ == "__main__":
    main()
