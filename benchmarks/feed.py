"""Whether a stream keeps up with workers whose steps take 50 ms, and how often it decodes a row group.

    python -m benchmarks.feed

1, 2, 4 and 8 ranks, each a process that takes its part of every batch and sleeps for 50 ms, from 2,000,000 rows of 28
float32, label and weight in Parquet, streamed and shuffled; 1,024 and 8,192 rows of a batch for each rank. Ideal is
rows of a batch in 50 ms. The CPU's share says when the machine is the limit. Decoded: row groups that the tasks of all
ranks read in an epoch, of those that there are.
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
from raykeras.blocks import gather_tasks
from raykeras.chunks import Feed
from raykeras.cluster import Room, connect, reading
from raykeras.data import open_data, train_orders
from raykeras.orders import DataOrders
from raykeras.stream import Stream

STEP_S, SECONDS, RANK_ROWS = 0.05, 20.0, (1_024, 8_192)


def orders_for(folder: Path, batch_size: int) -> DataOrders:
    given = open_data(rk.parquet(str(folder), **CASES["narrow"].options, cache=None), None, None, "float32")
    options: dict[str, Any] = {"class_weight": None, "steps_per_epoch": None, "seed": 0, "floatx": "float32"}
    orders = train_orders(given, batch_size=batch_size, shuffle=True, scale=rk.Scale(), **options)
    assert isinstance(orders, DataOrders)
    return dataclasses.replace(orders, num_shards=8)


def take(orders: DataOrders, rank: int, num_ranks: int, begin: float) -> int:
    """Rows that one rank gets in so many seconds, of which the first are not counted."""
    limits = reading(Room(0.1), num_ranks, 1)
    stream = Stream(Feed(orders.opened, orders.layout, orders.plan, rank, num_ranks, 1, reading=limits))
    batches = iter(stream.endless_dataset())
    next(batches)
    time.sleep(max(0.0, begin - time.time()))
    rows, due = 0, time.time()
    while due < begin + SECONDS:
        batch = next(batches)
        rows += len((batch[0] if num_ranks > 1 else batch)[1])
        due = max(due + STEP_S, time.time())  # a step begins when the last one is over and its batch is there
        time.sleep(max(0.0, due - time.time()))
    stream.close()
    return rows


def cpu_seconds() -> tuple[float, float]:
    """Busy and all seconds of all CPUs since the machine started."""
    first = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    ticks = [int(value) for value in first]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def measured(folder: Path, rank_rows: int, num_ranks: int) -> dict[str, float]:
    import ray

    orders = orders_for(folder, rank_rows * num_ranks)
    begin = time.time() + 15 + 8 * num_ranks  # TensorFlow is imported by all
    remote = ray.remote(num_cpus=0.1)(take)
    ranks = [remote.remote(orders, rank, num_ranks, begin) for rank in range(num_ranks)]
    time.sleep(max(0.0, begin - time.time()))
    busy, all_ = cpu_seconds()
    rows = sum(ray.get(ranks))
    busy, all_ = (b - a for a, b in zip((busy, all_), cpu_seconds(), strict=True))
    plan = orders.plan(0)
    decoded = 0
    for rank in range(num_ranks):
        windows = ((0, window) for window in plan.windows(rank, num_ranks))
        decoded += sum(len(task.units) for task in gather_tasks(windows, orders.opened, orders.layout.row_nbytes))
    ideal = num_ranks * rank_rows / STEP_S
    return {
        "rows_per_s": rows / SECONDS,
        "of_ideal": rows / SECONDS / ideal,
        "cpu": busy / all_,
        "decoded": decoded / len(orders.opened.unit_rows),
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
                run = functools.partial(measured, folder, rank_rows, num_ranks)
                results[f"{rank_rows} × {num_ranks}"] = run()
    header = ("rows of a batch × ranks", "rows/s", "of the ideal", "CPU", "row groups decoded, of all")
    rows = [
        (name, f"{r['rows_per_s']:,.0f}", f"{r['of_ideal']:.1%}", f"{r['cpu']:.0%}", f"{r['decoded']:.2f}")
        for name, r in results.items()
    ]
    print(side_by_side.table(header, rows))
    side_by_side.write(arguments.json, results)


if __name__ == "__main__":
    main()
