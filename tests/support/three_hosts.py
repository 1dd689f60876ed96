"""Faults of hosts and of the network between them, in the middle of a training on two of three hosts.

    python -m tests.support.three_hosts STORAGE

trains the run "run" on the cluster in RAY_ADDRESS. The head's host has the driver and the tasks that read data, and
each of the others one worker.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import raykeras as rk
from tests.support.hosts import Hosts
from tests.support.resuming import WEIGHT, X, Y, build, events_of, slow
from tests.support.two_nodes import HEALTH_CHECKS

EPOCHS = 12
_BATCH, _STEP_S, _CHECKPOINT_STEPS = 16, 0.3, 2
_WORKER = {"worker": 1}
_DEADLINE_S = 400

Fault = Callable[[Hosts], None]


def _cut(hosts: Hosts) -> None:
    """Cut a worker's host off for 20 s; then its node, which Ray has given up, is started again."""
    hosts.network(cut=[2])
    time.sleep(20)
    hosts.network()
    _start_again(hosts)


def _lossy(hosts: Hosts) -> None:
    """Lose 5 % of all packets, and delay each by 50 ms, for the rest of the training."""
    hosts.network(loss=0.05, delay_s=0.05)


def _replaced(hosts: Hosts) -> None:
    """Remove a worker's host, and add another one after 5 s."""
    hosts.kill(2)
    time.sleep(5)
    hosts.start_node(3, num_cpus=1, resources=json.dumps(_WORKER))


def _raylet(hosts: Hosts) -> None:
    """Kill the raylet of a worker's host; then its node is started again."""
    hosts.kill(2, "raylet/raylet")
    _start_again(hosts)


def _start_again(hosts: Hosts) -> None:
    """Start a node again once its raylet has ended, as a service manager does."""
    deadline = time.monotonic() + 60
    while hosts.processes(2, "raylet/raylet") and time.monotonic() < deadline:
        time.sleep(0.5)
    hosts.kill(2)
    hosts.start_node(2, num_cpus=1, resources=json.dumps(_WORKER))


def _gcs(hosts: Hosts) -> None:
    """Kill the GCS: without Redis, Ray cannot restart it, so the cluster is started again once the call has failed."""
    hosts.kill(0, "gcs_server")


def _driver(hosts: Hosts) -> None:
    """Lose the host of the head and the driver; then the cluster is started again."""
    hosts.kill(0)


FAULTS: dict[str, Fault] = {
    "a host cut off for 20 s": _cut,
    "5 % of packets lost, 50 ms later": _lossy,
    "a host replaced": _replaced,
    "a raylet killed": _raylet,
    "the GCS killed": _gcs,
    "the driver's host lost": _driver,
}


@dataclass(frozen=True)
class Recovery:
    """What a fault cost. None where there was nothing of the kind.

    Attributes:
        history: The history of the run.
        detection_s: Seconds from the fault until the driver noticed it.
        restart_s: Seconds from then until the workers continued from a checkpoint.
        first_step_s: Seconds from then until their first step had ended.
        lost_steps: Steps that were repeated.
        num_calls: Calls of `fit`.
    """

    history: dict[str, list[float]]
    detection_s: float | None
    restart_s: float | None
    first_step_s: float | None
    lost_steps: int
    num_calls: int


def write_data(storage: str) -> None:
    """Write the rows as Parquet."""
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), X.shape[1]), "y": Y, "w": WEIGHT})
    pq.write_table(table, Path(storage, "rows.parquet"), row_group_size=16)


def fit(storage: str, name: str, **options: object) -> rk.Result:
    """Train on the rows."""
    source = rk.parquet(str(Path(storage, "rows.parquet")), x="x", y="y", sample_weight="w", cache=None)
    run = rk.Run(storage=storage, name=name, checkpoint_every=_CHECKPOINT_STEPS, max_failures=100)
    return rk.fit(lambda: build(dropout=0), source, batch_size=_BATCH, epochs=EPOCHS, run=run, verbose=0, **options)


def undisturbed(storage: str) -> rk.Result:
    """Train on one worker in this process."""
    return fit(storage, "undisturbed")


def suffer(name: str, storage: str) -> Recovery:
    """Train on two hosts until the third epoch, let something fail, and call `fit` again until it returns.

    Args:
        name: A key of `FAULTS`.
        storage: Folder for the run, with the rows.
    """
    output, log = Path(storage, "output.txt"), Path(storage, "run", "events.jsonl")
    with Hosts(4, {**HEALTH_CHECKS, "RAY_gcs_rpc_server_reconnect_timeout_s": "10"}) as hosts:
        num_calls, at, deadline = 0, 0.0, time.monotonic() + _DEADLINE_S
        while True:
            _start_cluster(hosts)
            command = [sys.executable, "-m", "tests.support.three_hosts", storage, hosts.head]
            driver = hosts.start(0, command, output)
            num_calls += 1
            while not at and (not log.exists() or log.read_text().count('"EpochEnded"') < 2):
                if driver.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(output.read_text())
                time.sleep(0.1)
            if not at:
                at = time.time()
                FAULTS[name](hosts)
            try:
                if driver.wait(max(1.0, deadline - time.monotonic())) == 0:
                    break
            except subprocess.TimeoutExpired:
                raise RuntimeError(output.read_text()) from None
            for index in range(4):
                hosts.kill(index)
            hosts.network()
    return _recovery(Path(storage, "run"), at, num_calls, _last_json(output.read_text()))


def _last_json(text: str) -> dict[str, list[float]]:
    """Return the history, after which Ray may print something."""
    *_, last = [line for line in text.splitlines() if line.startswith("{")]
    history: dict[str, list[float]] = json.loads(last)
    return history


def _start_cluster(hosts: Hosts) -> None:
    hosts.start_node(0, num_cpus=1)
    for index in (1, 2):
        hosts.start_node(index, num_cpus=1, resources=json.dumps(_WORKER))


def _recovery(run: Path, at: float, num_calls: int, history: dict[str, list[float]]) -> Recovery:
    after = [event for event in events_of(str(run)) if event["time"] > at]
    before = [event for event in events_of(str(run)) if event["time"] <= at]
    restarts = [i for i, event in enumerate(after) if event["event"] in ("RunRestarted", "RunStarted")]
    if not restarts:
        return Recovery(history, None, None, None, 0, num_calls)
    restart = after[restarts[0]]
    failed = next((event for event in after[: restarts[0]] if event["event"] in ("WorkerFailed", "RunEnded")), None)
    reached = [event for event in [*before, *after[: restarts[0]]] if event["event"] in ("BatchEnded", "EpochEnded")][
        -1
    ]
    step = next(event for event in after[restarts[0] :] if event["event"] in ("BatchEnded", "EpochEnded"))
    num_steps = -(-len(X) // _BATCH)
    begin = restart.get("initial_epoch", restart["epoch"]), restart.get("initial_step", restart["step"])
    lost = (reached["epoch"] - begin[0]) * num_steps + reached["step"] - begin[1]
    detected = failed["time"] if failed is not None else None
    return Recovery(
        history,
        None if detected is None else detected - at,
        restart["time"] - (at if detected is None else detected),
        step["time"] - restart["time"],
        max(0, lost),
        num_calls,
    )


def differs_by(recovery: Recovery, expected: rk.Result) -> float:
    """Return the largest relative difference between two histories."""
    assert set(recovery.history) == set(expected.history)
    pairs = [(np.array(recovery.history[name]), np.array(values)) for name, values in expected.history.items()]
    assert all(len(one) == len(other) == EPOCHS for one, other in pairs)
    return max(float(np.max(np.abs(one - other) / np.maximum(np.abs(other), 1e-12))) for one, other in pairs)


def main(storage: str, address: str) -> None:
    """Train as the driver on the head's host, and print the history as the last line."""
    import ray

    ray.init(address=address, log_to_driver=False)
    scale = rk.Scale(workers=2, cpus_per_worker=1, resources_per_worker=_WORKER, spares=False)
    result = fit(storage, "run", callbacks=[slow(_STEP_S)], scale=scale)
    print(json.dumps(result.history), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
