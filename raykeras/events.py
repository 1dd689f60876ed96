"""What happens in a run, as small immutable values that travel from the workers to the driver.

Enters: what the worker's callbacks see. Leaves: a stream of `Event`s in the driver, in order.

`EventSender` is the worker's end. It never holds up a step: a thread of its own ships what has
gathered, and `BatchEnded`s that gather before a shipment are merged into the latest, which says in
`num_steps` how many it stands for. All other events arrive exactly once and in order. The pipe
between the ends is anything with `put(list)`: a `queue.SimpleQueue` inside one process, a
`ray.util.queue.Queue` between processes.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from raykeras.logs import Logs, as_json

FLUSH_INTERVAL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened.

    Attributes:
        rank: Rank of the worker that saw it; None where the driver did.
        epoch: Epoch, from 0; None outside of one.
        step: Steps finished in the epoch; None outside of one.
        time: Seconds since 1970 on the sender's clock.
    """

    rank: int | None = None
    epoch: int | None = None
    step: int | None = None
    time: float = field(default_factory=time.time)

    @property
    def kind(self) -> str:
        return type(self).__name__

    def as_dict(self) -> dict[str, Any]:
        """The event as JSON-ready values, its type under "event"."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"logs": as_json(values["logs"])} if "logs" in values else {}
        return {"event": self.kind, **values}


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """Training is about to begin.

    Attributes:
        params: As Keras gives to callbacks: epochs, steps, batch_size, num_rows.
        workers: Number of workers. replicas: number of replicas over all of them.
        initial_epoch: First epoch to train.
        initial_step: Steps of that epoch that an earlier process trained.
        path: The run's folder.
    """

    params: dict[str, Any]
    workers: int
    replicas: int
    initial_epoch: int
    path: str
    initial_step: int = 0


@dataclass(frozen=True, kw_only=True)
class EpochStarted(Event):
    """An epoch begins."""


@dataclass(frozen=True, kw_only=True)
class BatchEnded(Event):
    """One or more steps ended.

    Attributes:
        logs: The latest step's logs, reduced over all replicas.
        num_steps: Steps this event stands for since the one before it.
        rows_per_s: Rows of the global batches per second, since the epoch began.
        data_wait: Share of the epoch so far, 0 to 1, in which the step waited for data.
    """

    logs: Logs
    num_steps: int = 1
    rows_per_s: float = 0.0
    data_wait: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EpochEnded(Event):
    """An epoch ended, its validation included; `logs` as `on_epoch_end` sees them.

    Attributes:
        logs: Metrics by name, validation's with `val_`.
        seconds: Wall-clock time of the epoch.
        rows_per_s: Training rows per second, validation left out.
        data_wait: Share of the training time, 0 to 1, in which steps waited for data.
    """

    logs: Logs
    seconds: float = 0.0
    rows_per_s: float = 0.0
    data_wait: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ValidationEnded(Event):
    """A validation pass inside `fit` ended; `logs` without `val_`."""

    logs: Logs


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is complete under `path`.

    Attributes:
        path: Its folder.
        unserializable: Why Keras could not serialise the model, of which the checkpoint then holds the weights only;
            empty otherwise.
    """

    path: str
    unserializable: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckpointDamaged(Event):
    """The checkpoint under `path` is not whole, as `cause` says; the one before it is used."""

    path: str
    cause: str


@dataclass(frozen=True, kw_only=True)
class StorageFailed(Event):
    """A checkpoint could not be written, as `cause` says; training goes on, and it is tried again in `retry_s`."""

    cause: str
    retry_s: float


@dataclass(frozen=True, kw_only=True)
class ArtifactSaved(Event):
    """A file that a callback wrote was put under `path` in the run's folder."""

    path: str


@dataclass(frozen=True, kw_only=True)
class WorkerFailed(Event):
    """A worker failed; `rank` is its rank, `cause` one line, `node` where it ran, `next` what happens now."""

    cause: str
    node: str
    next: str = ""


@dataclass(frozen=True, kw_only=True)
class RunRestarted(Event):
    """Workers train again, from the position of the newest checkpoint; what came after it is made anew.

    Attributes:
        epoch, step: Where they go on: epochs finished, and steps of the next.
        workers: How many there are now.
        attempt: How often workers were started before.
    """

    workers: int
    attempt: int


@dataclass(frozen=True, kw_only=True)
class WorldResized(Event):
    """Training goes on with another number of workers.

    Attributes:
        workers, before: How many there are, and were.
    """

    workers: int
    before: int


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """Training ended.

    Attributes:
        status: "completed", "failed", or "interrupted", which is to be resumed.
        logs: The last epoch's logs.
    """

    status: str
    logs: Logs


class Pipe(Protocol):
    """What an `EventSender` ships into."""

    def put(self, item: list[Event], /) -> None: ...


def merge(earlier: BatchEnded, later: BatchEnded) -> BatchEnded:
    """The later of two, standing for the steps of both."""
    return dataclasses.replace(later, num_steps=earlier.num_steps + later.num_steps)


class EventSender:
    """The worker's end of the event stream. Thread-safe; `send` takes microseconds."""

    def __init__(self, put: Callable[[list[Event]], None], interval_s: float = FLUSH_INTERVAL_S) -> None:
        self._put = put
        self._interval_s = interval_s
        self._pending: list[Event] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._ship, name="raykeras-events", daemon=True)
        self._thread.start()

    def send(self, event: Event) -> None:
        with self._lock:
            last = self._pending[-1] if self._pending else None
            if isinstance(event, BatchEnded) and isinstance(last, BatchEnded) and last.epoch == event.epoch:
                self._pending[-1] = merge(last, event)
            else:
                self._pending.append(event)
        if not isinstance(event, BatchEnded):
            self._wake.set()

    def close(self) -> None:
        """Ships what is left. Raises what shipping raised, if it did."""
        self._closed = True
        self._wake.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _ship(self) -> None:
        while True:
            self._wake.wait(self._interval_s)
            self._wake.clear()
            closed = self._closed
            with self._lock:
                batch, self._pending = self._pending, []
            if batch:
                try:
                    self._put(batch)
                except Exception as error:  # kept for close(): a lost driver must not stop a step
                    self._failure = error
                    return
            if closed:
                return
