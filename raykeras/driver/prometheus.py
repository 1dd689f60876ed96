"""Gauges of a run, which Ray exports to Prometheus from the driver's node.

Ray forgets a gauge that is not set again within some export intervals. So gauges are set at a fixed interval while the
run goes on, and disappear when it has ended. Ray keeps counters and histograms until its node stops; there are none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from raykeras.core import events
from raykeras.core.events import Event
from raykeras.core.logs import scalars
from raykeras.driver.run_state import RunState

INTERVAL_S = 5.0
"""Between settings of the gauges; Ray exports them every 10 s."""

GAUGES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "raykeras_epoch_metric": (
        ("data", "name"),
        "Metric of the last epoch that ended, by data.",
    ),
    "raykeras_batch_metric": (("name",), "Metric of the current epoch so far."),
    "raykeras_learning_rate": ((), "Learning rate at the end of the last epoch."),
    "raykeras_rows_per_second": ((), "Training rows per second."),
    "raykeras_data_wait_ratio": ((), "Fraction of the epoch in which steps waited for data."),
    "raykeras_epoch": ((), "Current epoch, from 1."),
    "raykeras_step": ((), "Steps that ended in the current epoch."),
    "raykeras_workers": ((), "Current number of workers."),
    "raykeras_restarts": ((), "Number of restarts."),
    "raykeras_checkpoint_seconds": ((), "Time for which training stopped for the last checkpoint."),
    "raykeras_checkpoint_timestamp_seconds": ((), "When the last checkpoint was saved, since the Unix epoch."),
    "raykeras_worker_step_seconds": (("worker",), "Mean time of a step of a worker in the last epoch."),
    "raykeras_worker_data_wait_ratio": (("worker",), "Fraction of the epoch in which a worker waited for data."),
}
"""Tags, in addition to `run`, and description of each gauge. Ray prefixes the names with `ray_`."""


class PrometheusGauges:
    """An event handler that sets the gauges of a run if this process is connected to Ray."""

    def __init__(self) -> None:
        self._state = RunState()
        self._worker_steps: dict[int, events.WorkerStepsEnded] = {}
        self._lock = threading.Lock()  # of both
        self._gauges: dict[str, Any] = {}
        self._ended = threading.Event()

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._state(event)
            if isinstance(event, events.WorkerStepsEnded):
                self._worker_steps[event.rank or 0] = event
            elif isinstance(event, events.RunRestarted | events.WorldResized):
                self._worker_steps.clear()
        if isinstance(event, events.RunStarted):
            self._start(os.path.basename(event.path))
        elif isinstance(event, events.RunEnded):
            self._ended.set()
        if self._gauges and not isinstance(event, events.BatchEnded):
            self._set()

    def _start(self, run: str) -> None:
        import ray
        from ray.util.metrics import Gauge

        if not ray.is_initialized():
            return
        for name, (tags, description) in GAUGES.items():
            self._gauges[name] = Gauge(name, description, ("run", *tags)).set_default_tags({"run": run})
        threading.Thread(target=self._set_until_end, name="raykeras-gauges", daemon=True).start()

    def _set_until_end(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self._set()

    def _set(self) -> None:
        with self._lock:
            values = list(gauge_values(self._state, self._worker_steps))
        for name, tags, value in values:
            self._gauges[name].set(value, dict(zip(GAUGES[name][0], tags, strict=True)))


def gauge_values(
    state: RunState, worker_steps: Mapping[int, events.WorkerStepsEnded]
) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Yield the name, the values of the tags, and the value of each gauge.

    Args:
        state: The state of the run.
        worker_steps: The last steps of each worker, by rank.
    """
    yield "raykeras_epoch", (), state.epoch + 1 if state.epochs is None else min(state.epoch + 1, state.epochs)
    yield "raykeras_step", (), state.step
    yield "raykeras_workers", (), state.workers
    yield "raykeras_restarts", (), state.restarts
    yield "raykeras_rows_per_second", (), state.rows_per_s
    yield "raykeras_data_wait_ratio", (), state.data_wait
    for name, value in scalars(state.logs).items():
        if not name.startswith("val_"):
            yield "raykeras_batch_metric", (name,), value
    if state.finished:
        newest = state.finished[max(state.finished)]
        for name, value in scalars(newest.logs).items():
            data = "validation" if name.startswith("val_") else "train"
            yield "raykeras_epoch_metric", (data, name.removeprefix("val_")), value
        if newest.learning_rate is not None:
            yield "raykeras_learning_rate", (), newest.learning_rate
    if state.checkpoint is not None:
        yield "raykeras_checkpoint_seconds", (), state.checkpoint.seconds
        yield "raykeras_checkpoint_timestamp_seconds", (), state.checkpoint.time
    for rank, steps in worker_steps.items():
        if steps.num_steps:
            yield "raykeras_worker_step_seconds", (str(rank),), steps.seconds / steps.num_steps
            yield "raykeras_worker_data_wait_ratio", (str(rank),), steps.wait_s / max(steps.seconds, 1e-9)
