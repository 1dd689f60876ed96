"""What callbacks of trackers receive in the driver."""

from __future__ import annotations

from typing import Any

import pytest

from raykeras.core import events
from raykeras.core.errors import OptionError
from raykeras.driver.trackers import TrackerCallback

MODEL = {
    "class": "Sequential",
    "summary": "two\nlines",
    "parameters": 9,
    "optimizer": {"class": "SGD", "momentum": 0.5},
}


class Recorder:
    """A callback that records its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def set_params(self, params: Any) -> None:
        self.calls.append(params)

    def set_model(self, model: Any) -> None:
        self.model = model

    def on_train_begin(self, logs: Any) -> None:
        self.calls.append("begin")

    def on_epoch_begin(self, epoch: int, logs: Any) -> None:
        self.calls.append(("epoch", epoch))

    def on_test_end(self, logs: Any) -> None:
        self.calls.append(("validated", logs))

    def on_epoch_end(self, epoch: int, logs: Any) -> None:
        rate = self.model.optimizer.learning_rate
        self.calls.append((epoch, logs, rate and rate.numpy().item()))

    def on_train_end(self, logs: Any) -> None:
        self.calls.append("end")


def recorded(*more: events.Event) -> Recorder:
    start = events.RunStarted(params={"epochs": 2}, workers=2, replicas=2, initial_epoch=0, path="run", model=MODEL)
    tracker = TrackerCallback(recorder := Recorder())
    for event in (start, *more):
        tracker.dispatch(event)
    return recorder


def epoch(number: int, rate: float | None = 0.1) -> list[events.Event]:
    return [
        events.EpochStarted(epoch=number, step=0),
        events.ValidationEnded(epoch=number, step=5, logs={"loss": 2.0}),
        events.EpochEnded(epoch=number, step=5, logs={"loss": 1.0}, learning_rate=rate),
    ]


def test_repeated_epoch_is_logged_once() -> None:
    restarted = events.RunRestarted(epoch=0, step=0, workers=2, attempt=1)
    ended = events.RunEnded(status="completed", logs={})
    recorder = recorded(*epoch(0), restarted, *epoch(0), *epoch(1, rate=None), ended)
    validated = ("validated", {"loss": 2.0})
    first = [("epoch", 0), validated, (0, {"loss": 1.0}, 0.1)]
    second = [("epoch", 1), validated, (1, {"loss": 1.0}, None)]
    assert recorder.calls == [{"epochs": 2}, "begin", *first, *second, "end"]


def test_model_is_what_the_workers_reported() -> None:
    model, lines = recorded().model, []
    model.summary(print_fn=lines.append)
    assert lines == ["two", "lines"] and str(model) == "two\nlines"
    assert model.name == "Sequential" and model.count_params() == 9 and not model.layers
    assert type(model.optimizer).__name__ == "SGD" and model.optimizer.get_config() == {"momentum": 0.5}
    assert not hasattr(model, "to_json")
    with pytest.raises(OptionError, match=r"one requests `model\.predict`\. Use a callback of your own"):
        model.predict([1])
