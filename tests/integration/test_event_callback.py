"""The callback that sends events."""

from __future__ import annotations

from typing import Any

import keras

from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.keras_callbacks import as_callback_class
from raykeras.worker.callbacks import EventCallback


def test_logs_are_fetched_only_for_callbacks_that_read_them() -> None:
    class Reads(keras.callbacks.Callback):  # type: ignore[misc]
        def on_batch_end(self, batch: int, logs: Any = None) -> None: ...

    api, hook = KerasAPI("keras"), "on_train_batch_end"
    events = as_callback_class(api, EventCallback)(
        lambda event: None,
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
