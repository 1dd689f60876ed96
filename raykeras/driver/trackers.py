"""Callbacks of MLflow, Weights & Biases and Comet in the driver, whose process their tracker's run belongs to.

This applies to worker processes. If the worker is this process, Keras' `fit` calls these callbacks itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raykeras.core import events
from raykeras.core.errors import OptionError
from raykeras.core.events import Event
from raykeras.core.logs import Logs
from raykeras.driver.callback import DriverCallback
from raykeras.worker.callback_placement import placement_of, tracker_of, unwrapped


class _NotReportedError(OptionError, AttributeError):
    """A callback of a tracker requests what only the workers have."""


@dataclass(frozen=True)
class LearningRate:
    """A learning rate, to be read like a variable of Keras.

    Attributes:
        value: The learning rate.
    """

    value: float

    shape = ()

    def numpy(self) -> np.ndarray:
        """Return the learning rate as an array without dimensions."""
        return np.asarray(self.value)


@dataclass
class ReportedOptimizer:
    """What the workers reported of their optimizer, under Keras' names.

    Attributes:
        config: Its configuration when training began.
        learning_rate: Its learning rate at the end of the latest epoch; None if unknown.
    """

    config: Mapping[str, Any]
    learning_rate: LearningRate | None = None

    def get_config(self) -> dict[str, Any]:
        """Return the configuration."""
        return dict(self.config)


@dataclass(frozen=True)
class ReportedModel:
    """What the workers reported of their model, under Keras' names.

    Attributes:
        name: Name of its class.
        optimizer: Its optimizer.
        text: Its summary.
        num_parameters: Number of its parameters; None if it is built later.
    """

    name: str
    optimizer: ReportedOptimizer
    text: str
    num_parameters: int | None

    layers = ()  # they are on the workers

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> ReportedModel:
        """Return the model that `RunStarted.model` describes."""
        config = dict(description.get("optimizer", {}))
        optimizer = type(config.pop("class", "Optimizer"), (ReportedOptimizer,), {})  # trackers log the class's name
        name = description.get("class", "Model")
        return cls(name, optimizer(config), description.get("summary", name), description.get("parameters"))

    def summary(self, print_fn: Any = print, **_: Any) -> None:
        """Print the summary, line by line."""
        for line in self.text.splitlines():
            print_fn(line)

    def count_params(self) -> int | None:
        """Return the number of parameters."""
        return self.num_parameters

    def __str__(self) -> str:
        return self.text

    def __getattr__(self, name: str) -> Any:
        raise _NotReportedError(
            "With several workers, callbacks of trackers run in this process, which has the model's summary, number "
            f"of parameters, optimizer configuration and learning rate; one requests `model.{name}`. Use a callback of "
            "your own for it, which runs on the workers."
        )


class TrackerCallback(DriverCallback):
    """Calls the hooks of a tracker's Keras callback with the logs of the event stream.

    An epoch that is trained again after a failure is logged once.

    Args:
        callback: The Keras callback.
    """

    _optimizer: ReportedOptimizer

    def __init__(self, callback: Any) -> None:
        self._callback = callback
        self._last_epoch = -1

    def dispatch(self, event: Event) -> None:
        if event.epoch is not None and event.epoch <= self._last_epoch:
            return
        super().dispatch(event)
        if isinstance(event, events.EpochEnded) and event.epoch is not None:
            self._last_epoch = event.epoch

    def on_event(self, event: Event) -> None:
        if isinstance(event, events.RunStarted):
            model = ReportedModel.of(event.model)
            self._optimizer = model.optimizer
            self._callback.set_params(dict(event.params))
            self._callback.set_model(model)
        elif isinstance(event, events.EpochEnded):
            rate = event.learning_rate
            self._optimizer.learning_rate = None if rate is None else LearningRate(rate)

    def on_train_begin(self, logs: Logs) -> None:
        self._callback.on_train_begin(logs)

    def on_train_end(self, logs: Logs) -> None:
        self._callback.on_train_end(logs)

    def on_epoch_begin(self, epoch: int, logs: Logs) -> None:
        self._callback.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Logs) -> None:
        self._callback.on_epoch_end(epoch, logs)

    def on_test_end(self, logs: Logs) -> None:
        self._callback.on_test_end(logs)


class MlflowTracker(TrackerCallback):
    """Makes a run of MLflow the active one in the thread that dispatches events, since each thread has its own.

    Args:
        callback: The Keras callback.
        run_id: The run that is active in the thread that called `fit`.
    """

    def __init__(self, callback: Any, run_id: str) -> None:
        super().__init__(callback)
        self._run_id = run_id

    def on_train_begin(self, logs: Logs) -> None:
        import mlflow

        mlflow.start_run(self._run_id, log_system_metrics=False)
        super().on_train_begin(logs)

    def on_train_end(self, logs: Logs) -> None:
        import mlflow

        super().on_train_end(logs)
        mlflow.flush_async_logging()
        mlflow.end_run("RUNNING")  # deactivates it in this thread; the user's thread ends it


class CometTracker(TrackerCallback):
    """Sets the step of a Comet experiment, which its callback would count itself."""

    def on_event(self, event: Event) -> None:
        super().on_event(event)
        if isinstance(event, events.EpochEnded):
            assert event.epoch is not None and event.step is not None
            self._callback.experiment.set_step((event.epoch + 1) * event.step)


def split_trackers(callbacks: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the trackers' callbacks that run in this process, and the callbacks that run on the workers.

    The callback that MLflow's autologging adds to Keras' `fit` is one of the first.

    Args:
        callbacks: The user's Keras callbacks, some in `on_chief`.

    Raises:
        OptionError: If a tracker would log single steps.
    """
    trackers = unwrapped([callback for callback in callbacks if placement_of(callback) == "driver"])
    if not any(tracker_of(tracker) == "mlflow" for tracker in trackers):
        trackers += _autologging()
    for tracker in trackers:
        for option in ("log_every_n_steps", "log_freq"):
            if (value := getattr(tracker, option, None)) is not None:
                raise OptionError(
                    "With several workers, trackers log epochs, because steps reach this process merged; got a "
                    f"{type(tracker).__name__} with `{option}={value!r}`. Leave this option out."
                )
    return trackers, [callback for callback in callbacks if placement_of(callback) != "driver"]


@contextlib.contextmanager
def tracking(trackers: Sequence[Any]) -> Iterator[list[TrackerCallback]]:
    """Yield driver callbacks for the callbacks of trackers.

    If no run of MLflow is active, one is started, as MLflow's callback does in Keras' `fit`. It stays active, unless it
    is that of autologging.

    Args:
        trackers: Keras callbacks, as `split_trackers` returns them.
    """
    with contextlib.ExitStack() as stack:
        yield [_driver_callback(tracker, stack) for tracker in trackers]


def _driver_callback(tracker: Any, stack: contextlib.ExitStack) -> TrackerCallback:
    package = tracker_of(tracker)
    if package == "comet_ml":
        return CometTracker(tracker)
    if package != "mlflow":
        return TrackerCallback(tracker)
    import mlflow

    run = mlflow.active_run()
    if run is None:
        run = mlflow.start_run()
        if _autologging():
            stack.enter_context(run)
    return MlflowTracker(tracker, run.info.run_id)


def _autologging() -> list[Any]:
    """Return the callback that MLflow's autologging adds to Keras' `fit`; nothing if it is off."""
    for flavor in ("tensorflow", "keras"):
        module = sys.modules.get(f"mlflow.{flavor}")
        if module is None:
            continue
        from mlflow.utils.autologging_utils import autologging_is_disabled, get_autologging_config

        if not autologging_is_disabled(flavor):
            options = ("log_every_epoch", "log_every_n_steps")
            return [module.MlflowCallback(**{name: get_autologging_config(flavor, name) for name in options})]
    return []
