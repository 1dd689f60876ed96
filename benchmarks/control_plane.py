"""What the driver and the coordinator cost with 2 to 1,024 workers, simulated by threads of a few processes.

    python -m benchmarks.control_plane [RANKS ...]

Each rank uses the same classes as a worker does, against the same actors. What ranks compute is left out.

    start       from the first rank that announces its address until all ranks know all addresses
    agreement   from a request to save until all ranks have agreed on a step, median of ten
    events      events that the driver takes from the coordinator and writes to its log, per second
    driver      memory of the driver's process after that
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

import raykeras as rk
from benchmarks import side_by_side
from raykeras.checkpoint.store import RunFolder
from raykeras.driver.event_log import EventDispatcher, RunLog, forwarding
from raykeras.worker.coordinator import RunCoordinator, StepBarrier
from raykeras.worker.job_loop import JobExchange

RANKS = (2, 8, 32, 128, 512, 1024)
PROCESSES, ROUNDS, EVENTS = 2, 10, 20_000
STEP_S = 0.1  # of a simulated rank, in which the others run


class Ranks:
    """An actor that simulates some of the ranks."""

    def __init__(self, ranks: list[int], coordinator: RunCoordinator, exchange: JobExchange) -> None:
        self._ranks, self._coordinator, self._exchange = ranks, coordinator, exchange
        self._threads = ThreadPoolExecutor(len(ranks))
        self._barriers = [StepBarrier(coordinator, rank) for rank in ranks]

    def wait_for_processes(self) -> None:
        self._coordinator.notes()
        self._exchange.next(-1)

    def join(self) -> None:
        self._each(lambda rank: self._exchange.join(rank, f"10.0.0.1:{rank}", None))

    def agree(self) -> None:
        """Pass step boundaries until all ranks have saved; rank 0 requests it."""

        def passes(barrier: StepBarrier, action: Any) -> None:
            while "save" not in barrier.check(action):
                action = None
                time.sleep(STEP_S)

        actions = ["save" if rank == 0 else None for rank in self._ranks]
        list(self._threads.map(passes, self._barriers, actions))

    def send(self, num_events: int) -> None:
        logs = {"loss": 0.5, "accuracy": 0.5}
        events = [rk.BatchEnded(rank=0, epoch=0, step=1, logs=logs) for _ in range(num_events // len(self._ranks))]
        self._each(lambda rank: self._coordinator.put(events))

    def _each(self, function: Callable[[int], Any]) -> None:
        list(self._threads.map(function, self._ranks))


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def rss_mib() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) >> 10


def measured(num_ranks: int) -> tuple[str, ...]:
    """Return a row of the table."""
    coordinator, exchange = RunCoordinator(num_ranks), JobExchange(num_ranks)
    num_processes = min(PROCESSES, num_ranks)
    shares = [list(range(start, num_ranks, num_processes)) for start in range(num_processes)]
    actors = [ray.remote(num_cpus=0)(Ranks).remote(share, coordinator, exchange) for share in shares]
    exchange.end(-1)
    ray.get([actor.wait_for_processes.remote() for actor in actors])
    start = seconds(lambda: ray.get([actor.join.remote() for actor in actors]))
    agreements = [seconds(lambda: ray.get([actor.agree.remote() for actor in actors])) for _ in range(ROUNDS)]
    taken, is_done = [0], threading.Event()

    def count(event: rk.Event) -> None:
        taken[0] += 1
        if taken[0] >= EVENTS // num_processes // len(shares[0]) * num_ranks:
            is_done.set()

    with tempfile.TemporaryDirectory() as storage:
        folder = RunFolder.under(storage, "run")
        folder.make()
        folder.claim("token")
        log = RunLog(folder, "token")
        dispatcher = EventDispatcher([log, count])
        with forwarding(coordinator, dispatcher):
            begun = time.perf_counter()
            ray.get([actor.send.remote(EVENTS // num_processes) for actor in actors])
            is_done.wait()
            rate = taken[0] / (time.perf_counter() - begun)
        log.close()
    memory = rss_mib()
    for actor in actors:
        ray.kill(actor)
    exchange.close()
    return (
        f"{num_ranks:,}",
        f"{1000 * start:,.0f}",
        f"{1000 * statistics.median(agreements):,.0f}",
        f"{rate:,.0f}",
        f"{memory:,}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks", nargs="*", type=int, default=RANKS)
    arguments = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False)
    rows = [measured(num_ranks) for num_ranks in arguments.ranks]
    columns = ("ranks", "start, ms", "agreement, ms", "events/s", "driver, MiB")
    print(side_by_side.table(columns, rows), flush=True)


if __name__ == "__main__":
    main()
