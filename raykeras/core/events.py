"""The events of a run, as small immutable values that workers send to the driver.

`EventSender` delivers them from a background thread, so that sending never blocks a step. Consecutive `BatchEnded`
events that are pending are merged into the latest, whose `num_steps` counts the steps it stands for. All other events
arrive exactly once and in order.

`from_dict` reads events from a file that somebody else may have written: it accepts only what `as_dict` returns.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from raykeras.core.logs import Logs, as_json, plain_logs

FLUSH_INTERVAL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base class of all events.

    Attributes:
        rank: Rank of the worker that sent it; None if the driver did.
        epoch: Epoch, from 0; None outside an epoch.
        step: Number of steps finished in the epoch; None outside an epoch.
        time: Seconds since the Unix epoch on the sender's clock.
    """

    rank: int | None = None
    epoch: int | None = None
    step: int | None = None
    time: float = field(default_factory=lambda: time.time())  # looked up here, so that tests can replace the clock

    @property
    def kind(self) -> str:
        """The name of the event's class."""
        return type(self).__name__

    def as_dict(self) -> dict[str, Any]:
        """Return the event as JSON-compatible values, with its class name under "event"."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"logs": as_json(values["logs"])} if "logs" in values else {}
        return {"event": self.kind, **values}


PHASES = {
    "metadata": "reading metadata",
    "cluster": "connecting to Ray",
    "workers": "starting the workers",
    "build": "building the model",
    "compile": "compiling the first step",
    "train": "training",
}
"""The phases of an attempt in order, in words. A call of `fit` begins with the first one."""


@dataclass(frozen=True, kw_only=True)
class PhaseStarted(Event):
    """A phase of a run begins; "train" after the first step, which includes compiling it.

    Attributes:
        phase: A key of `PHASES`.
    """

    phase: str


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """Training is about to begin.

    Attributes:
        params: The parameters that Keras passes to callbacks, and more: epochs, steps, batch_size, num_rows, and
            validation (whether there is any).
        workers: Number of workers.
        replicas: Number of replicas over all workers.
        initial_epoch: First epoch to train.
        path: The run's folder.
        initial_step: Number of steps of the first epoch that were trained before.
        model: The model's class, summary and number of parameters, and its optimizer's configuration.
        history: As for `RunRestarted`.
    """

    params: dict[str, Any]
    workers: int
    replicas: int
    initial_epoch: int
    path: str
    initial_step: int = 0
    model: dict[str, Any] = field(default_factory=dict)
    history: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EpochStarted(Event):
    """An epoch begins."""


@dataclass(frozen=True, kw_only=True)
class BatchEnded(Event):
    """One or more steps ended.

    Attributes:
        logs: Logs of the latest step, reduced over all replicas.
        num_steps: Number of steps that the event stands for.
        rows_per_s: Rows of the global batches per second, since the epoch began.
        data_wait: Fraction of the epoch so far, 0 to 1, in which steps waited for data.
        wait_s: Seconds that these steps waited for data.
    """

    logs: Logs
    num_steps: int = 1
    rows_per_s: float = 0.0
    data_wait: float = 0.0
    wait_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EpochEnded(Event):
    """An epoch ended, including its validation.

    Attributes:
        logs: Metrics by name, as passed to `on_epoch_end`; those of the validation begin with `val_`.
        seconds: Wall-clock time of the epoch.
        rows_per_s: Training rows per second, excluding validation.
        data_wait: Fraction of the training time, 0 to 1, in which steps waited for data.
        learning_rate: The learning rate in the logs, as callbacks that change it report it, or else the optimizer's at
            the end of the epoch; None if there is none.
    """

    logs: Logs
    seconds: float = 0.0
    rows_per_s: float = 0.0
    data_wait: float = 0.0
    learning_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class WorkerStepsEnded(Event):
    """The steps of an epoch ended on one worker; every worker sends this event, in no order between workers.

    Attributes:
        num_steps: Number of steps that are measured; the first one of a worker, which compiles, is not.
        seconds: Wall-clock time of these steps.
        wait_s: Seconds for which these steps waited for data.
    """

    num_steps: int
    seconds: float
    wait_s: float


@dataclass(frozen=True, kw_only=True)
class ValidationEnded(Event):
    """A validation pass inside `fit` ended.

    Attributes:
        logs: Metrics by name, without `val_`.
        seconds: Wall-clock time of the pass.
    """

    logs: Logs
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint was saved.

    Attributes:
        path: The checkpoint's folder.
        unserializable: Why Keras could not serialise the model, so that the checkpoint holds the weights only; empty
            otherwise.
        seconds: Wall-clock time for which training stopped, to copy the variables.
        resumed: When training went on, in seconds since the Unix epoch; 0 if unknown.
    """

    path: str
    unserializable: str = ""
    seconds: float = 0.0
    resumed: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CheckpointDamaged(Event):
    """A checkpoint is damaged; the previous one is used.

    Attributes:
        path: The checkpoint's folder.
        cause: What is wrong with it.
    """

    path: str
    cause: str


@dataclass(frozen=True, kw_only=True)
class StorageFailed(Event):
    """A checkpoint could not be written; training continues, and the write is retried.

    Attributes:
        cause: Why the write failed.
        retry_s: Seconds until the next attempt.
    """

    cause: str
    retry_s: float


@dataclass(frozen=True, kw_only=True)
class ArtifactSaved(Event):
    """A file that a callback wrote was saved in the run's folder.

    Attributes:
        path: Where it was saved.
    """

    path: str


@dataclass(frozen=True, kw_only=True)
class WorkerFailed(Event):
    """A worker failed.

    Attributes:
        cause: What happened, in one line.
        node: Name of the node it ran on.
        next: What the run does now.
    """

    cause: str
    node: str
    next: str = ""


@dataclass(frozen=True, kw_only=True)
class RunRestarted(Event):
    """Training continues from the newest checkpoint; later steps are repeated.

    `epoch` and `step` are its position: the number of epochs finished, and of steps in the next one.

    Attributes:
        workers: Current number of workers.
        attempt: How many times workers were started before.
        history: Keras' history of the epochs before, and their numbers under "epoch". It is not in `events.jsonl`.
    """

    workers: int
    attempt: int
    history: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WorldResized(Event):
    """The number of workers changed.

    Attributes:
        workers: Current number of workers.
        before: Previous number of workers.
    """

    workers: int
    before: int


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """Training ended.

    Attributes:
        status: "completed", "failed" or "interrupted". An interrupted run can be resumed.
        logs: Logs of the last epoch.
        history: As for `RunRestarted`, of all epochs; empty if the run failed.
    """

    status: str
    logs: Logs
    history: dict[str, list[Any]] = field(default_factory=dict)


def merge(earlier: BatchEnded, later: BatchEnded) -> BatchEnded:
    """Return the later of two events, counting the steps and waits of both."""
    num_steps, wait_s = earlier.num_steps + later.num_steps, earlier.wait_s + later.wait_s
    return dataclasses.replace(later, num_steps=num_steps, wait_s=wait_s)


def missing_epochs(history: Mapping[str, list[Any]], known: Collection[int]) -> list[EpochEnded]:
    """Return the ends of epochs that are in a history, but whose events were lost with a worker or a driver.

    Args:
        history: Keras' history of several epochs, and their numbers under "epoch". Metrics that were not measured in
            each epoch are left out.
        known: The epochs that are known to have ended.
    """
    numbers = history.get("epoch", [])
    metrics = {name: values for name, values in history.items() if name != "epoch" and len(values) == len(numbers)}
    return [
        EpochEnded(rank=0, epoch=epoch, logs={name: values[i] for name, values in metrics.items()})
        for i, epoch in enumerate(numbers)
        if epoch not in known
    ]


def from_dict(values: Any) -> Event | None:
    """Return the event that `Event.as_dict` described; None for anything else, such as an event of a later version.

    Args:
        values: A value from a JSON file. It may come from anyone: every field is checked.
    """
    kind = _KINDS.get(str(values.get("event"))) if isinstance(values, Mapping) else None
    if kind is None:
        return None
    known: dict[str, Any] = {}
    for field_ in dataclasses.fields(kind):
        if field_.name in values:
            known[field_.name] = value = values[field_.name]
            if not _IS_VALID[field_.type](value):
                return None
        elif field_.default is field_.default_factory is dataclasses.MISSING:
            return None
    return kind(**{**known, **({"logs": plain_logs(known["logs"])} if "logs" in known else {})})


def _is_count(value: Any) -> bool:
    return type(value) is int and -1 <= value < 1 << 63  # before the first epoch is saved, the epoch is -1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e12


def _is_params(value: Any) -> bool:
    names = ("epochs", "steps", "num_rows", "batch_size")
    return type(value) is dict and all(value.get(name) is None or _is_count(value[name]) for name in names)


_IS_VALID: dict[Any, Callable[[Any], bool]] = {
    "str": lambda value: type(value) is str,
    "int": _is_count,
    "int | None": lambda value: value is None or _is_count(value),
    "float": _is_number,
    "float | None": lambda value: value is None or _is_number(value),
    "Logs": lambda value: type(value) is dict,
    "dict[str, Any]": _is_params,
    "dict[str, list[Any]]": lambda value: value == {},
}
"""Whether a value is valid, by the annotation of its field."""

_KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__subclasses__()}


class EventSender:
    """Sends events from a worker to the driver in the background. Thread-safe.

    Args:
        put: Delivers a list of events.
        interval_s: Seconds between deliveries of `BatchEnded`; other events are delivered at once.
    """

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
        """Queue an event without blocking."""
        with self._lock:
            last = self._pending[-1] if self._pending else None
            if isinstance(event, BatchEnded) and isinstance(last, BatchEnded) and last.epoch == event.epoch:
                self._pending[-1] = merge(last, event)
            else:
                self._pending.append(event)
        if not isinstance(event, BatchEnded):
            self._wake.set()

    def close(self) -> None:
        """Deliver the remaining events.

        Raises:
            Exception: Whatever `put` raised, now or before.
        """
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
                except Exception as error:  # Raised by close(): a lost driver must not stop a step.
                    self._failure = error
                    return
            if closed:
                return
