"""An interrupted run resumes and ends like an uninterrupted one; changed arguments are refused."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.checkpoint.store import RunFolder
from tests.support.models import PACKAGES
from tests.support.resuming import (
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
    slow,
    steering,
)

Point = tuple[int, int | None]
"""An epoch, and a step in it or None for its end."""


class Crash(Exception):
    """Ends training in this process."""


def crash(package: str, point: Point) -> Any:
    """Return a callback that raises after a step, or at the end of an epoch."""

    class Crashes(importlib.import_module(package).callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.epoch = epoch

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if (self.epoch, batch) == point:
                raise Crash

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if (epoch, None) == point:
                raise Crash

    return Crashes()


def crashed_and_uninterrupted(
    folder: Path,
    package: str,
    make: Callable[[], Any],
    points: Sequence[Point],
    *,
    data: Callable[[], Any] = lambda: (X, Y),
    checkpoint_every: int = 1,
    **options: Any,
) -> tuple[rk.Result, rk.Result, list[Any], list[Any]]:
    """Train once uninterrupted, and once with a crash at each point.

    Returns:
        The result of the crashed run and of the uninterrupted one, and the calls of a callback in each.
    """

    def run(name: str, *more: Any) -> tuple[rk.Result, list[Any]]:
        calls = recorder(package)
        x, y = data()
        all_options = {"epochs": EPOCHS, "batch_size": BATCH, "validation_data": VALIDATION, "verbose": 0, **options}
        kept = rk.Run(storage=str(folder), name=name, checkpoint_every=checkpoint_every)
        return rk.fit(make, x, y, callbacks=[calls, *more], run=kept, **all_options), calls.calls

    expected, expected_calls = run("uninterrupted")
    for point in points:
        with pytest.raises(rk.UserCodeError, match="Crash"):
            run("run", crash(package, point))
    result, calls = run("run")
    return result, expected, calls, expected_calls


@PACKAGES
@pytest.mark.parametrize("steps_per_execution", [1, 2])  # two does not divide the five steps of an epoch
def test_run_resumes_with_steps_per_execution_and_validation_freq(
    package: str, steps_per_execution: int, tmp_path: Path
) -> None:
    last = 5 if steps_per_execution == 2 and package == "keras" else 4  # Keras 3 counts whole executions
    result, expected, calls, expected_calls = crashed_and_uninterrupted(
        tmp_path,
        package,
        lambda: build(package, dropout=0, steps_per_execution=steps_per_execution),
        [(1, 3), (1, None), (2, last)],
        checkpoint_every=2,
        validation_freq=2,
    )
    assert_same(result, expected)
    assert calls == expected_calls


def test_run_resumes_with_steps_per_execution_on_two_replicas(tmp_path: Path) -> None:
    result, expected, calls, expected_calls = crashed_and_uninterrupted(
        tmp_path,
        "keras",
        lambda: build(dropout=0, steps_per_execution=2),
        [(1, 3)],
        checkpoint_every=2,
        scale=rk.Scale(replicas_per_worker=2),
    )
    assert_same(result, expected, rtol=1e-5)
    for call, expected_call in zip(calls, expected_calls, strict=True):
        for value, expected_value in zip(call, expected_call, strict=True):
            assert value == (pytest.approx(expected_value) if isinstance(value, float) else expected_value)


@pytest.mark.filterwarnings("ignore:In Keras 3 an epoch ends:UserWarning")
# covers every pair of values of the three parameters
@pytest.mark.parametrize(
    ("package", "steps_per_epoch", "steps_per_execution"),
    [("keras", 3, 1), ("keras", 7, 2), ("tf_keras", 3, 2), ("tf_keras", 7, 1)],
)
def test_run_resumes_if_steps_per_epoch_does_not_divide_pass(
    package: str, steps_per_epoch: int, steps_per_execution: int, tmp_path: Path
) -> None:
    """A pass has five steps. In Keras 3 an epoch ends with it; in tf_keras it continues in the next pass."""
    result, expected, calls, expected_calls = crashed_and_uninterrupted(
        tmp_path,
        package,
        lambda: build(package, dropout=0, steps_per_execution=steps_per_execution),
        [(2, 1)],
        steps_per_epoch=steps_per_epoch,
    )
    assert_same(result, expected)
    assert calls == expected_calls


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


def dataset_of_unknown_length() -> Any:
    return dataset()[0].filter(lambda x, y: True), None


def generator() -> Any:
    def generate() -> Iterator[Any]:
        while True:
            for start in range(0, len(X), BATCH):
                yield X[start : start + BATCH], Y[start : start + BATCH]

    return generate(), None


@pytest.mark.parametrize(
    ("data", "steps", "points"),
    [
        (sequence, None, [(1, 2), (1, None)]),
        (sequence, 3, [(1, 2), (1, None)]),
        (dataset, None, [(1, 2), (1, None)]),
        (dataset, 3, [(1, 2), (1, None)]),
        (dataset_of_unknown_length, 3, [(0, 1), (1, 1), (2, 0)]),  # the second epoch ends with the data
        (generator, 4, [(1, 2), (1, None)]),
    ],
)
def test_run_resumes_with_user_batches(data: Any, steps: int | None, points: list[Point], tmp_path: Path) -> None:
    result, expected, calls, expected_calls = crashed_and_uninterrupted(
        tmp_path, "keras", build, points, data=data, batch_size=None, steps_per_epoch=steps
    )
    assert_same(result, expected)
    assert calls == expected_calls


@pytest.mark.parametrize(("workers", "every", "step_s"), [(1, "0.2s", 0.1), (2, "0.2s", 0.1), (2, "continuous", 0.3)])
def test_checkpoints_are_saved_by_time(
    workers: int, every: str, step_s: float, two_workers: None, tmp_path: Path
) -> None:
    seen: list[rk.Event] = []
    options = {"scale": rk.Scale(workers=workers), "dropout": 0, "on_event": seen.append}
    run = {"checkpoint_every": every, "keep": 100}
    result = fit(str(tmp_path), "timed", [slow(step_s)], run=run, **options)
    saved = [event.step for event in seen if isinstance(event, rk.CheckpointSaved)]
    assert any(saved)  # some of them mid-epoch
    assert_same(result, fit(str(tmp_path), "uninterrupted", dropout=0), rtol=1e-5)


def test_csv_logger_continues_its_file(tmp_path: Path) -> None:
    import keras

    def run(name: str, *more: Any) -> rk.Result:
        logger = keras.callbacks.CSVLogger(str(tmp_path / f"{name}.csv"))
        return fit(str(tmp_path), name, [logger, *more])

    run("uninterrupted")
    with pytest.raises(rk.UserCodeError, match="Crash"):
        run("run", crash("keras", (2, None)))
    run("run")
    assert (tmp_path / "run.csv").read_text() == (tmp_path / "uninterrupted.csv").read_text()


def test_finished_run_is_extended(tmp_path: Path) -> None:
    uninterrupted = fit(str(tmp_path), "uninterrupted", epochs=EPOCHS)
    fit(str(tmp_path), "run", epochs=2)
    assert_same(fit(str(tmp_path), "run", epochs=EPOCHS), uninterrupted)
    assert_same(fit(str(tmp_path), "run", epochs=EPOCHS), uninterrupted)  # no epoch is left


def test_run_ended_by_early_stopping_is_not_continued(tmp_path: Path) -> None:
    stopped = fit(str(tmp_path), "stopped", steering(), epochs=30)
    assert len(stopped.epoch) < 30
    assert_same(fit(str(tmp_path), "stopped", steering(), epochs=30), stopped)


# Refused


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


def fit_for_two_epochs(
    storage: Path, x: Any = X, make: Any = build, seed: int = 0, resume: str | None = "auto", **options: Any
) -> rk.Result:
    run = rk.Run(storage=str(storage), name="run", seed=seed, resume=resume)
    return rk.fit(make, x, Y, run=run, verbose=0, **{"batch_size": BATCH, "epochs": 2, **options})


@pytest.fixture(scope="module")
def first_epoch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """Return the storage of a run of one epoch, and its weights."""
    storage = tmp_path_factory.mktemp("first_epoch")
    return storage, fit_for_two_epochs(storage, epochs=1).model().get_weights()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": X + 1}, "since '.*' the array 'x' changed. Restore"),
        ({"batch_size": 15}, "batch_size was 16 and is now 15"),
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"shuffle": False}, "order was 'shuffled' and is now 'source'"),
        ({"steps_per_epoch": 3}, "steps_per_epoch was None and is now 3"),
        ({"make": other_optimizer}, "optimizer that it started with; .* has Adam, this run has SGD"),
        ({"make": other_model}, "model that it started with; .* this run has"),
    ],
)
def test_changed_arguments_are_refused(
    changed: dict[str, Any], message: str, first_epoch: tuple[Path, list[np.ndarray]], tmp_path: Path
) -> None:
    storage, weights = first_epoch
    shutil.copytree(storage, tmp_path, dirs_exist_ok=True)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises((rk.OptionError, rk.CheckpointError), match=message):
        fit_for_two_epochs(tmp_path, **changed)
    if "make" in changed:
        return
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    again = fit_for_two_epochs(tmp_path, **{**changed, "resume": "weights", "epochs": 1})
    assert again.epoch == [0]
    assert any(not np.array_equal(a, b) for a, b in zip(again.model().get_weights(), weights, strict=True))


def test_changed_metrics_are_refused_mid_epoch(tmp_path: Path) -> None:
    def fit_with(metrics: list[str], *callbacks: Any) -> rk.Result:
        def make() -> Any:
            model = build()
            model.compile("sgd", model.loss, metrics=metrics)
            return model

        run = rk.Run(storage=str(tmp_path), name="run", checkpoint_every=1)
        return rk.fit(make, X, Y, epochs=2, batch_size=BATCH, verbose=0, callbacks=list(callbacks), run=run)

    with pytest.raises(rk.UserCodeError, match="Crash"):
        fit_with(["accuracy"], crash("keras", (0, 2)))
    with pytest.raises(rk.CheckpointError, match=r"needs the metrics that it started with; .* Compile the model"):
        fit_with(["accuracy", "mae"])
    assert fit_with(["accuracy"]).epoch == [0, 1]


def test_changed_file_is_named(tmp_path: Path) -> None:
    def write(number: int, x: np.ndarray) -> None:
        pq.write_table(pa.table({"x": list(x), "y": Y[:20]}), tmp_path / "data" / f"{number}.parquet")

    def call(**options: Any) -> rk.Result:
        source = rk.parquet(tmp_path / "data", x="x", y="y")
        return rk.fit(build, source, run=rk.Run(storage=str(tmp_path), name="run"), verbose=0, **options)

    (tmp_path / "data").mkdir()
    for i in range(3):
        write(i, X[:20])
    call(epochs=1)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "data", copy_function=shutil.copyfile)
    assert len(call(epochs=2).epoch) == 2
    write(1, -X[:20])
    with pytest.raises(rk.OptionError, match=r"since '.*' the contents of the files changed, first '.*1\.parquet'\."):
        call(epochs=3)


def test_folder_without_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(rk.OptionError, match="holds files that do not belong to a run"):
        fit(str(tmp_path), "run")


@contextlib.contextmanager
def default_handler(number: signal.Signals) -> Iterator[None]:
    """Handle a signal as Python does by default; pytest-xdist ignores SIGINT."""
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, handler)
    try:
        yield
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("workers", "number"),
    [(1, signal.SIGINT), (1, signal.SIGHUP), (2, signal.SIGTERM)],
    ids=["SIGINT", "SIGHUP", "SIGTERM on two workers"],
)
def test_signal_saves_and_run_resumes(workers: int, number: signal.Signals, kept_workers: None, tmp_path: Path) -> None:
    options = {"scale": rk.Scale(workers=workers), "epochs": 6}
    raised = (KeyboardInterrupt, "can be resumed") if number == signal.SIGINT else (SystemExit, str(128 + number))

    class Interrupts(rk.DriverCallback):
        def on_epoch_begin(self, epoch: int, logs: dict[str, Any]) -> None:
            if epoch == 1:
                os.kill(os.getpid(), number)

    uninterrupted = fit(str(tmp_path), "uninterrupted", **options)
    with default_handler(number), pytest.raises(raised[0], match=raised[1]):
        fit(str(tmp_path), "run", [Interrupts(), slow(0.1)], **options)
    last = events_of(str(tmp_path / "run"))[-1]
    assert (last["event"], last["status"]) == ("RunEnded", "interrupted")
    saved = RunFolder(str(tmp_path / "run")).checkpoints()[-1].state
    assert 1 <= saved["epoch"] < 6
    resumed = fit(str(tmp_path), "run", **options)
    assert_same(resumed, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signal_before_first_step_stops_at_once(number: signal.Signals, tmp_path: Path) -> None:
    steps = []

    class Interrupts(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            os.kill(os.getpid(), number)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            steps.append(batch)

    with default_handler(number), pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        fit(str(tmp_path), "run", [Interrupts()])
    assert not steps and not RunFolder(str(tmp_path / "run")).checkpoints()
    assert events_of(str(tmp_path / "run"))[-1]["status"] == "interrupted"


def test_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    class Interrupts(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        assert fit(str(tmp_path), "run", [Interrupts()]).epoch
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("optimizer", ["keras.optimizers", "tf_keras.optimizers", "tf_keras.optimizers.legacy"])
def test_learning_rate_set_by_callback_is_resumed(optimizer: str, kept_workers: None, tmp_path: Path) -> None:
    package = importlib.import_module(optimizer.split(".")[0])
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}

    def compiled() -> Any:
        package.utils.set_random_seed(0)
        model = package.Sequential([package.layers.Input(X.shape[1:]), package.layers.Dense(3)])
        model.compile(importlib.import_module(optimizer).SGD(0.1), "mse")
        return model

    def reduce() -> Any:
        return package.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=100)

    expected = compiled()
    history = expected.fit(X, X[:, :3], epochs=5, callbacks=[reduce()], **options).history
    for epochs in (3, 5):
        model = compiled()
        run = rk.Run(storage=str(tmp_path), name="run")
        scale = rk.Scale(workers=2)
        result = rk.fit(model, X, X[:, :3], epochs=epochs, callbacks=[reduce()], scale=scale, run=run, **options)
    np.testing.assert_allclose(result.history["loss"], history["loss"], rtol=1e-5)
    assert float(model.optimizer.learning_rate) == float(expected.optimizer.learning_rate) < 0.1
