"""The worker's end of the event stream: exactly once, in order, and never in the way."""

from __future__ import annotations

import inspect
import pickle
import threading
import time
from typing import Any

import keras
import pytest

from raykeras import events
from raykeras.callbacks import event_callback
from raykeras.events import BatchEnded, EpochEnded, EpochStarted, Event, EventSender
from raykeras.keras_api import KerasAPI


def test_all_but_batches_arrive_once_and_in_order() -> None:
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


def test_a_slow_driver_gets_merged_batches_and_holds_up_nothing() -> None:
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
    assert seconds < 5  # that is, it did not wait for ever
    assert len(flat) <= 3
    assert sum(event.num_steps for event in flat if isinstance(event, BatchEnded)) == 10_000
    assert flat[-1].step == 10_000


def test_closing_raises_what_shipping_raised() -> None:
    def lost(batch: list[Event]) -> None:
        raise ConnectionError("the driver is gone")

    sender = EventSender(lost)
    sender.send(EpochStarted(epoch=0))
    with pytest.raises(ConnectionError, match="the driver is gone"):
        sender.close()


def test_every_event_pickles_and_is_json_ready() -> None:
    values = {"params": {}, "workers": 1, "replicas": 1, "initial_epoch": 0, "path": "p", "logs": {"loss": 1.0}}
    values |= {"cause": "c", "node": "n", "status": "completed", "attempt": 1, "retry_s": 1.0, "before": 2}
    for _, cls in inspect.getmembers(events, inspect.isclass):
        if not issubclass(cls, Event) or cls is Event:
            continue
        names = inspect.signature(cls).parameters
        event = cls(**{name: value for name, value in values.items() if name in names})
        assert pickle.loads(pickle.dumps(event)) == event
        assert event.as_dict()["event"] == cls.__name__


def test_a_step_is_waited_for_only_if_a_callback_reads_its_logs() -> None:
    class Reads(keras.callbacks.Callback):  # type: ignore[misc]
        def on_batch_end(self, batch: int, logs: Any = None) -> None: ...

    api, hook = KerasAPI("keras"), "on_train_batch_end"
    ours = event_callback(api, lambda event: None, rank=0, batch_rows=lambda step: 0, waited_s=lambda step, since: 0.0)
    assert api.quick_hooks([keras.callbacks.History(), ours], hook) == [ours.on_train_batch_end]
    assert api.quick_hooks([keras.callbacks.History(), ours], "on_train_batch_begin") == []
    for theirs in (Reads(), keras.callbacks.LambdaCallback(on_train_batch_end=print)):
        assert api.quick_hooks([theirs, ours], hook) is None
    assert KerasAPI("tf_keras").quick_hooks([], hook) is None  # which sees to it itself
