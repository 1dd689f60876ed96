"""Run simulations, and print the number of each seed that fails."""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import time

from tests.simulation.ray_api import installed
from tests.simulation.simulation import failure_of

_CHUNK = 250


def failures(first: int, end: int) -> dict[int, str]:
    """Run simulations in this process; return why seeds failed."""
    with installed():
        return {seed: failure for seed in range(first, end) if (failure := failure_of(seed))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, metavar="N", help="number of seeds")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first seed")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--trace", action="store_true", help="print what happens, instead of only the failures")
    arguments = parser.parse_args()
    begin, num_failed = time.perf_counter(), 0
    end = arguments.first + arguments.seeds
    if arguments.trace:
        for seed in range(arguments.first, end):
            lines: list[str] = []
            with installed():
                failure = failure_of(seed, lines)
            num_failed += bool(failure)
            print("\n".join([f"seed {seed}", *lines, failure]))
    else:
        with concurrent.futures.ProcessPoolExecutor(arguments.processes) as pool:
            chunks = [(first, min(first + _CHUNK, end)) for first in range(arguments.first, end, _CHUNK)]
            for found in pool.map(failures, *zip(*chunks, strict=True)):
                num_failed += len(found)
                for seed, failure in found.items():
                    print(f"seed {seed}: {failure}", flush=True)
    seconds = time.perf_counter() - begin
    print(f"{arguments.seeds} seeds in {seconds:.1f} s, {num_failed} failed")
    raise SystemExit(num_failed > 0)


if __name__ == "__main__":
    main()
