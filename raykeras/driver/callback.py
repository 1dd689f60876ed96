"""Callbacks that run in the driver, on the event stream."""

from __future__ import annotations

from typing import Any

from raykeras.core import events
from raykeras.core.errors import OptionError
from raykeras.core.events import Event
from raykeras.core.logs import Logs
from raykeras.worker.callback_placement import unwrapped


class DriverCallback:
    """Base class of callbacks that run in the driver, on the event stream.

    Pass instances in the `callbacks` of `fit`, together with Keras callbacks. A driver callback sees the events of the
    chief (rank 0), never delays a training step, and may use objects that exist only in the driver's process. Values of
    logs are floats, or arrays for metrics that have several values. `should_stop` may end training after an epoch.
    """

    def on_train_begin(self, logs: Logs) -> None:
        """Called once when training begins; not again when workers are restarted.

        Args:
            logs: Empty.
        """

    def on_train_end(self, logs: Logs) -> None:
        """Called when training ended, in whatever way.

        Args:
            logs: Metrics of the last epoch.
        """

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        """Called at the start of an epoch.

        Args:
            epoch: Index of the epoch, from 0.
            logs: Empty.
        """

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        """Called at the end of an epoch, after its validation.

        Args:
            epoch: Index of the epoch, from 0.
            logs: Metrics of the epoch; those of the validation begin with `val_`.
        """

    def on_train_batch_end(self, batch: int, logs: Logs) -> None:
        """Called at the end of a training batch; one call may stand for several batches.

        Args:
            batch: Index of the batch within the epoch, from 0; of several batches, that of the last one.
            logs: Metrics of the epoch so far.
        """

    def on_test_end(self, logs: Logs) -> None:
        """Called at the end of a validation pass.

        Args:
            logs: Metrics of the validation, without `val_`.
        """

    def should_stop(self, epoch: int, logs: Logs) -> bool:
        """Return whether training stops after an epoch.

        If a callback overrides this method, training waits at the end of each epoch, once its checkpoint is saved,
        until the method returns. All workers then stop after this epoch, as with `model.stop_training` of Keras.

        If the method raises an exception, the run is interrupted after this epoch, and `fit` raises the exception.
        Such a run can be resumed.

        Args:
            epoch: Index of the epoch, from 0.
            logs: Metrics of the epoch, as for `on_epoch_end`, which is called first.

        Returns:
            True to stop training.
        """
        return False

    def on_event(self, event: Event) -> None:
        """Called with every event, before the hook for that event.

        Args:
            event: The event.
        """

    def dispatch(self, event: Event) -> None:
        """Call the hooks for an event.

        Args:
            event: The event.
        """
        self.on_event(event)
        epoch = event.epoch or 0
        if isinstance(event, events.RunStarted):
            self.on_train_begin({})
        elif isinstance(event, events.EpochStarted):
            self.on_epoch_begin(epoch, {})
        elif isinstance(event, events.BatchEnded):
            self.on_train_batch_end((event.step or 1) - 1, dict(event.logs))
        elif isinstance(event, events.ValidationEnded):
            self.on_test_end(dict(event.logs))
        elif isinstance(event, events.EpochEnded):
            self.on_epoch_end(epoch, dict(event.logs))
        elif isinstance(event, events.RunEnded):
            self.on_train_end(dict(event.logs))


def split_callbacks(callbacks: Any) -> tuple[list[DriverCallback], list[Any]]:
    """Return the driver callbacks and the Keras callbacks.

    Raises:
        OptionError: If one of them is not a callback object.
    """
    if callbacks is None:
        return [], []
    callbacks = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    for callback, inner in zip(callbacks, unwrapped(callbacks), strict=True):
        if isinstance(inner, type) or not hasattr(inner, "on_epoch_end"):
            raise OptionError(f"`callbacks` must be callback objects; got {callback!r}.")
    return (
        [c for c in callbacks if isinstance(c, DriverCallback)],
        [c for c in callbacks if not isinstance(c, DriverCallback)],
    )


def only_keras_callbacks(callbacks: Any, function: str) -> list[Any]:
    """Return the callbacks of a function that sends no events.

    Args:
        callbacks: As the user passed them.
        function: The function's name.

    Raises:
        OptionError: If one of them is a `DriverCallback` or no callback object.
    """
    driver_callbacks, keras_callbacks = split_callbacks(callbacks)
    if driver_callbacks:
        raise OptionError(
            f"`callbacks` of `{function}` must be Keras callbacks, since only `fit` sends events; got a "
            f"{type(driver_callbacks[0]).__name__}, which is a DriverCallback. Use a Keras callback."
        )
    return keras_callbacks
