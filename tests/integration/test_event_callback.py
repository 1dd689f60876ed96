"""The callback that sends events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import pytest

import raykeras as rk
from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.keras_callbacks import as_callback_class
from raykeras.worker.callbacks import EventCallback
from tests.support.models import TWO
from tests.support.resuming import fit


def test_logs_are_fetched_only_for_callbacks_that_read_them() -> None:
    class Reads(keras.callbacks.Callback):  # type: ignore[misc]
        def on_batch_end(self, batch: int, logs: Any = None) -> None: ...

    api, hook = KerasAPI("keras"), "on_train_batch_end"
    events = as_callback_class(api, EventCallback)(
        lambda event: None,
        send_times=lambda event: None,
        rank=0,
        batch_rows=lambda step: 0,
        waited_s=lambda step, since: 0.0,
        learning_rate=lambda: None,
    )
    assert api.direct_hooks([keras.callbacks.History(), events], hook) == [events.on_train_batch_end]
    assert api.direct_hooks([keras.callbacks.History(), events], "on_train_batch_begin") == []
    for callback in (Reads(), keras.callbacks.LambdaCallback(on_train_batch_end=print)):
        assert api.direct_hooks([callback, events], hook) is None
    assert KerasAPI("tf_keras").direct_hooks([], hook) is None  # tf_keras skips hooks itself


@pytest.mark.parametrize("scale", [rk.Scale(), TWO], ids=["one worker", "two workers"])
def test_every_worker_sends_its_step_times(scale: rk.Scale, tmp_path: Path, two_workers: None) -> None:
    seen: list[rk.Event] = []
    fit(str(tmp_path), "run", scale=scale, epochs=2, on_event=seen.append)
    times = [event for event in seen if isinstance(event, rk.WorkerStepsEnded)]
    measured = [4, 5]  # the first of ten steps compiles
    assert sorted((event.epoch, event.rank, event.num_steps) for event in times) == [
        (epoch, rank, measured[epoch]) for epoch in range(2) for rank in range(scale.workers)
    ]
    assert all(0 <= event.wait_s <= event.seconds for event in times)
