"""The worker's end of the event stream: exactly once, in order, without blocking a step."""

from __future__ import annotations

import inspect
import json
import pickle
import threading
import time

import pytest

from raykeras.core import events
from raykeras.core.events import BatchEnded, EpochEnded, EpochStarted, Event, EventSender


def test_events_arrive_once_and_in_order() -> None:
    got: list[Event] = []
    sender = EventSender(got.extend)
    sent: list[Event] = []
    for epoch in range(50):
        sent += [EpochStarted(epoch=epoch), EpochEnded(epoch=epoch, logs={"loss": 1.0})]
        sender.send(sent[-2])
        for step in range(20):
            sender.send(BatchEnded(epoch=epoch, step=step + 1, logs={}))
        sender.send(sent[-1])
    sender.close()
    assert [event for event in got if not isinstance(event, BatchEnded)] == sent
    for epoch in range(50):
        batches = [e for e in got if isinstance(e, BatchEnded) and e.epoch == epoch]
        assert sum(batch.num_steps for batch in batches) == 20
        assert batches[-1].step == 20


def test_slow_driver_gets_merged_batches() -> None:
    released = threading.Event()
    got: list[list[Event]] = []

    def slow(batch: list[Event]) -> None:
        released.wait()
        got.append(batch)

    sender = EventSender(slow)
    begun = time.perf_counter()
    for step in range(10_000):
        sender.send(BatchEnded(epoch=0, step=step + 1, logs={"loss": float(step)}))
    seconds = time.perf_counter() - begun
    released.set()
    sender.close()
    flat = [event for batch in got for event in batch]
    assert seconds < 5  # it did not wait for the driver
    assert len(flat) <= 3
    assert sum(event.num_steps for event in flat if isinstance(event, BatchEnded)) == 10_000
    assert flat[-1].step == 10_000


def test_close_raises_send_failure() -> None:
    def lost(batch: list[Event]) -> None:
        raise ConnectionError("the driver is gone")

    sender = EventSender(lost)
    sender.send(EpochStarted(epoch=0))
    with pytest.raises(ConnectionError, match="the driver is gone"):
        sender.close()


def test_events_pickle_and_convert_to_json() -> None:
    values = {"params": {}, "workers": 1, "replicas": 1, "initial_epoch": 0, "path": "p", "logs": {"loss": 1.0}}
    values |= {"cause": "c", "node": "n", "status": "completed", "attempt": 1, "retry_s": 1.0, "before": 2}
    values |= {"phase": "build", "num_steps": 3, "seconds": 1.0, "wait_s": 0.5}
    for _, cls in inspect.getmembers(events, inspect.isclass):
        if not issubclass(cls, Event) or cls is Event:
            continue
        names = inspect.signature(cls).parameters
        event = cls(**{name: value for name, value in values.items() if name in names})
        assert pickle.loads(pickle.dumps(event)) == event
        assert event.as_dict()["event"] == cls.__name__
        assert events.from_dict(json.loads(json.dumps(event.as_dict()))) == event


def test_merged_batches_add_up() -> None:
    first, second = BatchEnded(step=3, logs={}, num_steps=3, wait_s=1.0), BatchEnded(step=4, logs={}, wait_s=0.5)
    merged = events.merge(first, second)
    assert (merged.step, merged.num_steps, merged.wait_s) == (4, 4, 1.5)


EPOCH = EpochEnded(epoch=3, step=4, logs={"loss": 0.5}, time=1.0).as_dict()


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        {"event": "Event"},
        {"event": "__import__"},
        {"event": ["EpochEnded"]},
        {"event": "EpochEnded"},
        {**EPOCH, "logs": [1]},
        {**EPOCH, "epoch": "3"},
        {**EPOCH, "epoch": True},
        {**EPOCH, "epoch": 1 << 80},
        {**EPOCH, "epoch": -5},
        {**EPOCH, "time": float("nan")},
        {**EPOCH, "seconds": 10**400},
        {**EPOCH, "learning_rate": {}},
    ],
    ids=str,
)
def test_values_of_other_types_are_no_events(values: object) -> None:
    assert events.from_dict(values) is None


def test_unknown_fields_of_later_versions_are_ignored() -> None:
    event = events.from_dict({**EPOCH, "later": [1, 2], "logs": {"loss": 0.5, "note": "text", "f1": [0.1, 0.2]}})
    assert event is not None and event.epoch == 3 and sorted(event.logs) == ["f1", "loss"]  # type: ignore[attr-defined]
