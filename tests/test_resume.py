"""A run that was broken off goes on and ends as one that was not; what has changed is refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raykeras as rk
from raykeras.checkpoint import RunFolder
from tests.kept import KeptWorkers
from tests.resuming import (
    BATCH,
    EPOCHS,
    VALIDATION,
    X,
    Y,
    assert_same,
    build,
    events_of,
    fit,
    recorder,
    steering,
)
from tests.two_nodes import slow

PACKAGES = pytest.mark.parametrize("package", ["keras", "tf_keras"])


class Crash(Exception):
    """Ends a training in this process."""


def crash(package: str, epoch: int, batch: int | None) -> Any:
    """A callback that raises after a step, or at an epoch's end."""
    import importlib

    class Crashes(importlib.import_module(package).callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, at: int, logs: Any = None) -> None:
            self.at = at

        def on_train_batch_end(self, number: int, logs: Any = None) -> None:
            if (self.at, number) == (epoch, batch):
                raise Crash

        def on_epoch_end(self, at: int, logs: Any = None) -> None:
            if batch is None and at == epoch:
                raise Crash

    return Crashes()


def crashed_and_resumed(
    tmp_path: Path, package: str, make: Any, at: tuple[int, int | None], every: int = 1, **options: Any
) -> tuple[rk.Result, rk.Result, list[Any], list[Any]]:
    """A run that crashed and went on, one that did not, and the calls that a callback had in each."""

    def run(name: str, *more: Any, resume: str | None = "auto") -> tuple[rk.Result, list[Any]]:
        mine = recorder(package)
        given = {"epochs": EPOCHS, "batch_size": BATCH, "validation_data": VALIDATION, "verbose": 0, **options}
        x, y = given.pop("data", (X, Y))() if callable(given.get("data")) else given.pop("data", (X, Y))
        given["run"] = rk.Run(storage=str(tmp_path), name=name, checkpoint_every=every, resume=resume)
        return rk.fit(make, x, y, callbacks=[mine, *more], **given), mine.calls

    expected, calls = run("undisturbed")
    with pytest.raises(rk.UserCodeError, match="Crash"):
        run("run", crash(package, *at))
    result, resumed_calls = run("run")
    return result, expected, resumed_calls, calls


@PACKAGES
@pytest.mark.parametrize("steps", [1, 2])  # two do not divide an epoch's five
@pytest.mark.parametrize("at", [(1, 3), (1, None), (2, 4)])
def test_steps_per_execution_and_validation_freq(
    package: str, steps: int, at: tuple[int, int | None], tmp_path: Path
) -> None:
    if steps == 2 and at == (2, 4) and package == "keras":
        at = (2, 5)  # Keras 3 counts whole executions

    def make() -> Any:
        return build(package, dropout=0, steps_per_execution=steps)

    result, expected, mine, theirs = crashed_and_resumed(tmp_path, package, make, at, every=2, validation_freq=2)
    assert_same(result, expected)
    assert mine == theirs


def test_executions_of_several_steps_on_two_replicas(tmp_path: Path) -> None:
    result, expected, mine, theirs = crashed_and_resumed(
        tmp_path,
        "keras",
        lambda: build(dropout=0, steps_per_execution=2),
        (1, 3),
        every=2,
        scale=rk.Scale(replicas_per_worker=2),
    )
    assert_same(result, expected, rtol=1e-5)
    for ours, undisturbed in zip(mine, theirs, strict=True):
        assert [v for v in ours if type(v) is not float] == [v for v in undisturbed if type(v) is not float]
        assert [v for v in ours if type(v) is float] == pytest.approx([v for v in undisturbed if type(v) is float])


@PACKAGES
@pytest.mark.parametrize("steps_per_epoch", [3, 7])  # of a pass of five
@pytest.mark.parametrize("steps", [1, 2])
def test_steps_per_epoch_go_on_in_the_stream(package: str, steps_per_epoch: int, steps: int, tmp_path: Path) -> None:
    result, expected, mine, theirs = crashed_and_resumed(
        tmp_path,
        package,
        lambda: build(package, dropout=0, steps_per_execution=steps),
        (2, 1),
        steps_per_epoch=steps_per_epoch,
    )
    assert_same(result, expected)
    assert mine == theirs


def sequence() -> Any:
    import keras

    class Batches(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return -(-len(X) // BATCH)

        def __getitem__(self, index: int) -> Any:
            return X[index * BATCH :][:BATCH], Y[index * BATCH :][:BATCH]

    return Batches(), None


def dataset() -> Any:
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH), None


def generator() -> Any:
    def generate() -> Iterator[Any]:
        while True:
            for start in range(0, len(X), BATCH):
                yield X[start : start + BATCH], Y[start : start + BATCH]

    return generate(), None


@pytest.mark.parametrize(
    ("data", "steps"), [(sequence, None), (sequence, 3), (dataset, None), (dataset, 3), (generator, 4)]
)
@pytest.mark.parametrize("at", [(1, 2), (1, None)])
def test_batches_of_the_users_own(data: Any, steps: int | None, at: tuple[int, int | None], tmp_path: Path) -> None:
    result, expected, mine, theirs = crashed_and_resumed(
        tmp_path, "keras", build, at, data=data, batch_size=None, steps_per_epoch=steps
    )
    assert_same(result, expected)
    assert mine == theirs


@pytest.mark.parametrize("workers", [1, 2])
def test_checkpoints_by_time(workers: int, two_workers: None, tmp_path: Path) -> None:
    seen: list[rk.events.Event] = []
    options = {"scale": rk.Scale(workers=workers), "dropout": 0, "on_event": seen.append}
    result = fit(str(tmp_path), "timed", [slow()], run={"checkpoint_every": "0.6s", "keep": 100}, **options)
    saved = [event.step for event in seen if isinstance(event, rk.events.CheckpointSaved)]
    assert any(saved)  # some of them in the middle of an epoch
    assert_same(result, fit(str(tmp_path), "undisturbed", dropout=0), rtol=1e-5)


def test_csv_logger_goes_on_in_its_file(tmp_path: Path) -> None:
    import keras

    def run(name: str, *more: Any) -> rk.Result:
        logger = keras.callbacks.CSVLogger(str(tmp_path / f"{name}.csv"))
        return fit(str(tmp_path), name, [logger, *more])

    run("undisturbed")
    with pytest.raises(rk.UserCodeError, match="Crash"):
        run("run", crash("keras", 2, None))
    run("run")
    assert (tmp_path / "run.csv").read_text() == (tmp_path / "undisturbed.csv").read_text()


def test_a_finished_run_is_extended_and_an_early_stop_stays(tmp_path: Path) -> None:
    whole = fit(str(tmp_path), "whole", epochs=EPOCHS)
    fit(str(tmp_path), "run", epochs=2)
    assert_same(fit(str(tmp_path), "run", epochs=EPOCHS), whole)
    assert_same(fit(str(tmp_path), "run", epochs=EPOCHS), whole)  # nothing is left to do

    stopped = fit(str(tmp_path), "stopped", steering(), epochs=30)
    assert len(stopped.epoch) < 30
    assert_same(fit(str(tmp_path), "stopped", steering(), epochs=30), stopped)


# What is refused


def other_optimizer() -> Any:
    import keras

    model = build()
    model.compile(keras.optimizers.SGD(0.02), "sparse_categorical_crossentropy")
    return model


def other_model() -> Any:
    import keras

    model = keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(3, activation="softmax")])
    model.compile(keras.optimizers.Adam(0.02), "sparse_categorical_crossentropy")
    return model


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": X + 1}, "fingerprint was .* and is now"),
        ({"batch_size": 15}, "batch_size was 16 and is now 15"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"shuffle": False}, "order was 'shuffled' and is now 'source'"),
        ({"steps_per_epoch": 3}, "steps_per_epoch was None and is now 3"),
        ({"make": other_optimizer}, "optimizer that it began with; .* has Adam, this one has SGD"),
        ({"make": other_model}, "model that it began with; .* this one has"),
    ],
)
def test_what_changed_is_refused_with_both_sides(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    def run(x: Any = X, make: Any = build, seed: int = 0, resume: str | None = "auto", **options: Any) -> rk.Result:
        given = rk.Run(storage=str(tmp_path), name="run", seed=seed, resume=resume)
        return rk.fit(make, x, Y, run=given, verbose=0, **{"batch_size": BATCH, "epochs": 2, **options})

    first = run(epochs=1)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises((rk.OptionError, rk.CheckpointError), match=message):
        run(**changed)
    if "make" not in changed:
        assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    with pytest.raises(rk.OptionError, match="`resume` is None"):
        run(resume=None)
    if "make" in changed:
        return
    weights = first.model().get_weights()
    again = run(**{**changed, "resume": "weights", "epochs": 1})
    assert again.epoch == [0]
    assert any(not np.array_equal(a, b) for a, b in zip(again.model().get_weights(), weights, strict=True))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(rk.OptionError, match="holds something that is no run"):
        fit(str(tmp_path), "run")


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_saves_at_the_step_and_can_be_resumed(workers: int, kept_workers: KeptWorkers, tmp_path: Path) -> None:
    options = {"scale": rk.Scale(workers=workers), "epochs": 12}

    class Interrupts(rk.DriverCallback):
        def on_epoch_begin(self, epoch: int, logs: dict[str, float]) -> None:
            if epoch == 1:
                os.kill(os.getpid(), signal.SIGINT)

    with kept_workers.used():
        undisturbed = fit(str(tmp_path), "undisturbed", **options)
    with pytest.raises(KeyboardInterrupt, match="can go on"):
        fit(str(tmp_path), "run", [Interrupts(), slow()], **options)
    ended = events_of(str(tmp_path / "run"))[-1]
    assert (ended["event"], ended["status"]) == ("RunEnded", "interrupted")
    saved = RunFolder(str(tmp_path / "run")).checkpoints()[-1].state
    assert 1 <= saved["epoch"] < 12
    with kept_workers.used():
        resumed = fit(str(tmp_path), "run", **options)
    assert_same(resumed, undisturbed)
