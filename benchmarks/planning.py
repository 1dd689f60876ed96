"""Planning at the scale of the internet, by simulation.

    python -m benchmarks.planning [--units 10000000 --ranks 4096 --rows 1000000000000]

Makes the plan of a pass over so many row groups and rows, as the driver and each rank do, in a process of its own, and
has ranks go to steps at random: how long the plan takes and how much memory, and how long until a rank has its first
window. Nothing is read.
"""

from __future__ import annotations

import resource
import time

import numpy as np

from benchmarks import side_by_side
from raykeras.plan import PassPlan, default_num_shards

BATCH_SIZE, SEEKS = 1 << 20, 200


def main() -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--units", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=10**12)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    mean = arguments.rows // arguments.units
    unit_rows = rng.integers(mean // 2, mean + mean // 2, arguments.units)
    num_shards = default_num_shards(arguments.ranks)

    seconds, seeks = [], []
    for epoch in range(arguments.rounds):
        begun = time.perf_counter()
        plan = PassPlan(unit_rows, global_batch_size=BATCH_SIZE, num_shards=num_shards, epoch=epoch)
        seconds.append(time.perf_counter() - begun)
        for _ in range(SEEKS):
            rank, step = int(rng.integers(arguments.ranks)), int(rng.integers(plan.num_steps))
            begun = time.perf_counter()
            window = next(plan.windows(rank, arguments.ranks, step))
            seeks.append(1e3 * (time.perf_counter() - begun))
            assert window.start <= plan.batch_range(step, rank, arguments.ranks)[0] < window.start + window.num_rows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    header = ("row groups", "rows", "ranks", "plan, s", "peak of the process, MiB", "seek, ms (median)", "(most)")
    row = (
        f"{arguments.units:,}",
        f"{plan.num_rows:,}",
        f"{arguments.ranks:,}",
        f"{np.median(seconds):.1f}",
        f"{peak:.0f}",
        f"{np.median(seeks):.2f}",
        f"{max(seeks):.2f}",
    )
    print(side_by_side.table(header, [row]))
    side_by_side.write(arguments.json, {"seconds": seconds, "peak_mib": peak, "seek_ms": seeks})


if __name__ == "__main__":
    main()
