"""Every built-in callback has the same effect on two workers as in plain Keras.

tf_keras' callbacks that affect training run on two replicas of one worker, unless pytest is run with `--exhaustive`.
"""

from __future__ import annotations

import csv
import functools
import http.server
import importlib
import inspect
import json
import textwrap
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.worker.callback_placement import PLACEMENTS, placement_of
from tests.support.compare import assert_same_training, assert_same_weights
from tests.support.models import TWO
from tests.support.tracked import in_tensorboard

ROWS, BATCH, EPOCHS = 70, 16, 4  # five steps, the last one short
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
VALIDATION = (X[:21] + 0.1, Y[:21])

pytestmark = pytest.mark.usefixtures("two_workers")
PACKAGES = pytest.mark.parametrize("package", ["keras", "tf_keras"])
TF_KERAS_ON_REPLICAS = pytest.mark.tf_keras_on_replicas


def model_of(package: str, **optimizer: Any) -> Any:
    keras = importlib.import_module(package)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((4,)),
            keras.layers.Dense(3, activation="tanh"),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.05, **optimizer), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def assert_matches_keras(
    package: str,
    callbacks: Any,
    plain_callbacks: Any,
    folder: Path,
    data: Any = (X, Y),
    scale: rk.Scale = TWO,
    **options: Any,
) -> rk.Result:
    """Train on two workers and in plain Keras, each with its callbacks; assert equal histories and weights."""
    optimizer = options.pop("optimizer", {})
    options = {"batch_size": BATCH, "epochs": EPOCHS, "shuffle": False, "verbose": 0, **options}
    model, oracle = model_of(package, **optimizer), model_of(package, **optimizer)
    expected = oracle.fit(*data, callbacks=plain_callbacks, **options).history
    run = rk.Run(storage=str(folder), name="run")
    result = rk.fit(model, *data, callbacks=callbacks, scale=scale, run=run, **options)
    assert_same_training(result, expected, oracle)
    assert float(model.optimizer.learning_rate) == pytest.approx(float(oracle.optimizer.learning_rate))
    return result


@PACKAGES
def test_every_built_in_callback_has_placement(package: str) -> None:
    module = importlib.import_module(package).callbacks
    for name, value in inspect.getmembers(module, inspect.isclass):
        assert name in PLACEMENTS, f"{package} has a new callback: {name}"
        if name != "CallbackList":
            assert issubclass(value, module.Callback)
    custom = type("Custom", (module.EarlyStopping,), {})
    assert placement_of(custom()) == "every"
    assert placement_of(type("Custom", (module.CSVLogger,), {})("x.csv")) == "chief"
    assert placement_of(rk.on_chief(custom())) == "chief"


@PACKAGES
@TF_KERAS_ON_REPLICAS
def test_early_stopping_restores_best_weights(package: str, several: rk.Scale, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks
    options = {"monitor": "val_loss", "min_delta": 0.05, "patience": 1, "restore_best_weights": True}
    callback, plain = (callbacks.EarlyStopping(**options, start_from_epoch=1) for _ in range(2))
    training: dict[str, Any] = {"epochs": 12, "validation_data": VALIDATION, "scale": several}
    result = assert_matches_keras(package, callback, [plain], tmp_path, **training)
    assert len(result.epoch) < 12
    assert_same_weights(result.checkpoints[-1].load_model(), plain.model)
    for name in ("stopped_epoch", "best_epoch", "wait"):
        assert getattr(callback, name) == getattr(plain, name)
    assert callback.best == pytest.approx(plain.best, rel=1e-5)


@PACKAGES
@TF_KERAS_ON_REPLICAS
def test_reduce_lr_on_plateau_matches_keras(package: str, several: rk.Scale, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks
    options = {"monitor": "loss", "min_delta": 10, "factor": 0.5, "patience": 1}
    callback, plain = (callbacks.ReduceLROnPlateau(**options) for _ in range(2))
    result = assert_matches_keras(package, callback, [plain], tmp_path, scale=several)
    rates = result.history["lr" if package == "tf_keras" else "learning_rate"]
    assert rates[0] > rates[-1]


@PACKAGES
@TF_KERAS_ON_REPLICAS
def test_learning_rate_scheduler_matches_keras(package: str, several: rk.Scale, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks
    schedule = lambda epoch, rate: rate * 0.5 if epoch else rate  # noqa: E731
    callback, plain = (callbacks.LearningRateScheduler(schedule) for _ in range(2))
    assert_matches_keras(package, callback, [plain], tmp_path, scale=several)


@PACKAGES
@TF_KERAS_ON_REPLICAS
def test_terminate_on_nan_matches_keras(package: str, several: rk.Scale, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks
    with_nan = X.copy()
    with_nan[2 * BATCH + 3] = np.nan  # the third of five steps

    class Counts(callbacks.Callback):
        batches = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.batches += 1

    counts, plain_counts = Counts(), Counts()
    both = ([callbacks.TerminateOnNaN(), counts] for counts in (counts, plain_counts))
    assert_matches_keras(package, *both, tmp_path, data=(with_nan, Y), scale=several)
    assert counts.batches == plain_counts.batches == 3


@PACKAGES
@TF_KERAS_ON_REPLICAS
def test_backup_and_restore_matches_keras(package: str, several: rk.Scale, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks

    class Breaks(callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise ArithmeticError("interrupted")

    model, oracle = model_of(package), model_of(package)
    folder, plain_folder = (tmp_path / name for name in ("backup", "plain"))
    options = {"batch_size": BATCH, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    run = rk.Run(storage=str(tmp_path), name="interrupted")
    with pytest.raises(rk.UserCodeError, match="interrupted"):
        rk.fit(model, X, Y, callbacks=[callbacks.BackupAndRestore(folder), Breaks()], scale=several, run=run, **options)
    with pytest.raises(ArithmeticError):
        oracle.fit(X, Y, callbacks=[callbacks.BackupAndRestore(plain_folder), Breaks()], **options)
    assert folder.exists()
    callback, plain = (callbacks.BackupAndRestore(path) for path in (folder, plain_folder))
    result = assert_matches_keras(package, callback, [plain], tmp_path, scale=several)
    assert result.epoch == [2, 3]
    assert folder.exists() == plain_folder.exists()


def test_swap_ema_weights_matches_keras(tmp_path: Path) -> None:
    import keras

    callback, plain = (keras.callbacks.SwapEMAWeights(swap_on_epoch=True) for _ in range(2))
    optimizer = {"use_ema": True, "ema_momentum": 0.9}
    assert_matches_keras("keras", callback, [plain], tmp_path, optimizer=optimizer, validation_data=VALIDATION)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Start a local HTTP server; return its address and the list of JSON objects that it receives."""
    received: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()


@dataclass(frozen=True)
class Reported:
    """A run on two workers with every callback that writes or reports, and the same training in plain Keras.

    Attributes:
        package: "keras" or "tf_keras".
        folder: Folder that the callbacks of both wrote to.
        result: Result of the run on two workers.
        callbacks, plain_callbacks: Callbacks of each, by name.
        received: What the HTTP server received from the run on two workers.
    """

    package: str
    folder: Path
    result: rk.Result
    callbacks: Mapping[str, Any]
    plain_callbacks: Mapping[str, Any]
    received: list[dict[str, Any]]

    @property
    def artifacts(self) -> Path:
        return Path(self.result.path, "artifacts")


def reporting_callbacks(package: str, artifacts: str, absolute: Path, server: str) -> dict[str, Any]:
    """Return the callbacks that write or report, by name.

    Args:
        package: "keras" or "tf_keras".
        artifacts: Prefix of their paths: "" for relative paths, or a folder with a trailing slash.
        absolute: Folder for callbacks that take an absolute path.
        server: Address of the HTTP server.
    """
    callbacks = importlib.import_module(package).callbacks

    class LossHistory(callbacks.Callback):
        """The callback of the Keras guide."""

        def on_train_begin(self, logs: Any = None) -> None:
            self.per_batch_losses: list[float] = []

        def on_batch_end(self, batch: int, logs: Any = None) -> None:
            self.per_batch_losses.append(logs.get("loss"))

    def write(epoch: int, logs: Any) -> None:
        import ray.train

        path = absolute / f"rank-{ray.train.get_context().get_world_rank()}"
        path.write_text(json.dumps({"epoch": epoch, "loss": float(logs["loss"])}))

    best = {"save_best_only": True, "monitor": "val_loss"}
    return {
        "best": callbacks.ModelCheckpoint(f"{artifacts}best/mymodel_{{epoch}}.keras", **best),
        "often": callbacks.ModelCheckpoint(f"{absolute}/often/model-loss={{loss:.2f}}.keras", save_freq=3),
        "csv": callbacks.CSVLogger(f"{artifacts}log.csv"),
        "tensorboard": callbacks.TensorBoard(f"{artifacts}logs", histogram_freq=1, write_graph=False),
        "remote": callbacks.RemoteMonitor(root=server, send_as_json=True),
        "history": callbacks.History(),
        "progress": callbacks.ProgbarLogger(),
        "losses": LossHistory(),
        "lambda": callbacks.LambdaCallback(on_epoch_end=write),
    }


@pytest.fixture(scope="module", params=["keras", "tf_keras"])
def reported(
    request: pytest.FixtureRequest,
    kept_workers: None,
    server: tuple[str, list[dict[str, Any]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Reported:
    folder, (address, received) = tmp_path_factory.mktemp("reported"), server
    (folder / "plain").mkdir()
    callbacks = reporting_callbacks(request.param, "", folder, address)
    plain = reporting_callbacks(request.param, f"{folder}/plain/", folder / "plain", address)
    del plain["lambda"]  # it needs a rank
    received.clear()
    result = assert_matches_keras(
        request.param, [*callbacks.values()], [*plain.values()], folder, validation_data=VALIDATION
    )
    return Reported(request.param, folder, result, callbacks, plain, received[EPOCHS:])  # after those of plain Keras


def test_model_checkpoint_keeps_best(reported: Reported) -> None:
    assert reported.callbacks["best"].filepath == "best/mymodel_{epoch}.keras"
    saved, plain = (sorted(path.iterdir()) for path in (reported.artifacts / "best", reported.folder / "plain/best"))
    assert [path.name for path in saved] == [path.name for path in plain]
    load = importlib.import_module(reported.package).models.load_model
    predicted, expected = (load(paths[-1]).predict(X, verbose=0) for paths in (saved, plain))
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-6)
    events = [json.loads(line) for line in Path(reported.result.path, "events.jsonl").read_text().splitlines()]
    announced = [event["path"] for event in events if event["event"] == "ArtifactSaved"]
    assert [path for path in announced if "/best/" in path] == [str(path) for path in saved]


def test_model_checkpoint_saves_by_save_freq(reported: Reported) -> None:
    names, expected = (
        sorted(path.name for path in (folder / "often").iterdir())
        for folder in (reported.folder, reported.folder / "plain")
    )
    assert len(names) > 3
    assert names == expected


def test_csv_logger_matches_keras(reported: Reported) -> None:
    rows, expected = (
        list(csv.DictReader(path.read_text().splitlines()))
        for path in (reported.artifacts / "log.csv", reported.folder / "plain/log.csv")
    )
    assert len(rows) == len(expected) == EPOCHS
    for row, expected_row in zip(rows, expected, strict=True):
        values, expected_values = ({name: float(value) for name, value in r.items()} for r in (row, expected_row))
        assert values == pytest.approx(expected_values, rel=1e-5)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_tensorboard_histograms_match_keras(part: str, reported: Reported) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps_by_tag = []
    for folder in (reported.artifacts / "logs", reported.folder / "plain/logs"):
        accumulator = EventAccumulator(str(folder / part))
        accumulator.Reload()
        tags = accumulator.Tags()["tensors"]
        steps_by_tag.append({tag: [event.step for event in accumulator.Tensors(tag)] for tag in tags})
    steps, expected = steps_by_tag
    assert steps["epoch_loss"] == [0, 1, 2, 3]
    assert len(steps) == len(expected)  # histograms are named after layers, whose names contain counters
    assert sorted(steps.values()) == sorted(expected.values())
    assert any("kernel" in tag for tag in steps) == (part == "train")


def test_tensorboard_scalars_are_history(reported: Reported) -> None:
    stored = in_tensorboard(reported.artifacts / "logs")
    for name, values in reported.result.history.items():
        assert stored[name] == [(epoch, pytest.approx(value)) for epoch, value in enumerate(values)]


def test_remote_monitor_sends_once(reported: Reported) -> None:
    assert [logs["epoch"] for logs in reported.received] == [0, 1, 2, 3]
    assert [logs["loss"] for logs in reported.received] == pytest.approx(reported.result.history["loss"])


def test_history_is_filled(reported: Reported) -> None:
    history = reported.callbacks["history"]
    assert history.epoch == reported.result.epoch
    assert set(history.history) == set(reported.result.history)
    for name, values in reported.result.history.items():
        assert history.history[name] == pytest.approx(values)


def test_custom_callback_attributes_are_returned(reported: Reported) -> None:
    losses = reported.callbacks["losses"].per_batch_losses
    assert len(losses) == EPOCHS * 5
    np.testing.assert_allclose(losses, reported.plain_callbacks["losses"].per_batch_losses, rtol=1e-5)


def test_lambda_callback_runs_on_every_worker(reported: Reported) -> None:
    first, second = (json.loads((reported.folder / f"rank-{rank}").read_text()) for rank in (0, 1))
    assert first == second
    assert first == pytest.approx({"epoch": 3, "loss": reported.result.history["loss"][-1]})


def stopping(callbacks: Any, at: int, only_rank: int | None = None) -> Any:
    """Return a callback that stops training after a number of steps, on all workers or on one."""

    class Stops(callbacks.Callback):
        num_steps = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.num_steps += 1
            if self.num_steps == at and (only_rank is None or self._rank() == only_rank):
                self.model.stop_training = True

        def _rank(self) -> int:
            import ray.train

            return int(ray.train.get_context().get_world_rank())

    return Stops()


@PACKAGES
def test_stop_by_all_workers_matches_keras(package: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks
    callback = stopping(callbacks, at=3)
    assert_matches_keras(package, callback, [stopping(callbacks, at=3)], tmp_path)
    assert callback.num_steps == 3


@pytest.mark.parametrize(("rank", "at"), [(1, 3), (0, 5)], ids=["mid-epoch", "by the chief at the epoch's end"])
def test_stop_by_one_worker_stops_all_at_same_step(rank: int, at: int, tmp_path: Path) -> None:
    import keras

    callback = stopping(keras.callbacks, at, only_rank=rank)
    model, oracle = model_of("keras"), model_of("keras")
    options = {"batch_size": BATCH, "epochs": EPOCHS, "shuffle": False, "verbose": 0, "validation_data": VALIDATION}
    result = rk.fit(model, X, Y, callbacks=callback, scale=TWO, run=rk.Run(storage=str(tmp_path)), **options)
    assert at <= callback.num_steps <= at + 1  # the other worker may have started another step
    expected = oracle.fit(X, Y, callbacks=[stopping(keras.callbacks, callback.num_steps)], **options).history
    assert_same_training(result, expected, oracle)


def test_on_chief_callback_runs_once_and_stops_all_workers(tmp_path: Path) -> None:
    import keras

    class Once(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.ranks: list[int] = []

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            import ray.train

            rank = ray.train.get_context().get_world_rank()
            (tmp_path / f"epoch-{epoch}-rank-{rank}").touch()
            self.ranks.append(rank)
            self.model.stop_training = epoch == 1

    callback = Once()
    model = model_of("keras")
    run = rk.Run(storage=str(tmp_path / "runs"))
    options = {"batch_size": BATCH, "epochs": 9, "verbose": 0}
    result = rk.fit(model, X, Y, callbacks=[rk.on_chief(callback)], scale=TWO, run=run, **options)
    assert callback.ranks[:2] == [0, 0]
    assert len(result.epoch) < 9
    assert {path.name[-6:] for path in tmp_path.glob("epoch-*")} == {"rank-0"}


@PACKAGES
def test_callbacks_can_be_reused(package: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks
    used = [callbacks.EarlyStopping("loss"), callbacks.TensorBoard(str(tmp_path / "logs"))]
    model = model_of(package)
    for scale in (rk.Scale(), TWO):
        run = rk.Run(storage=str(tmp_path))
        result = rk.fit(model, X, Y, epochs=1, verbose=0, callbacks=used, scale=scale, run=run)
        assert result.epoch == [0]


def test_unpicklable_callback_names_attribute(tmp_path: Path) -> None:
    import keras

    class Holds(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.fine = 1
            self.guard = threading.Lock()

    with pytest.raises(rk.OptionError, match=r"`Holds\.guard`, a lock, cannot"):
        rk.fit(model_of("keras"), X, Y, callbacks=[Holds()], scale=TWO, run=rk.Run(storage=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "name", "reason"),
    [
        ("keras", "OrbaxCheckpoint", "it saves with JAX"),
        ("tf_keras", "BaseLogger", "it reads what `fit` no longer provides"),
        ("tf_keras", "SidecarEvaluatorModelExport", "it is for `keras.utils.SidecarEvaluator`"),
    ],
)
def test_unsupported_callbacks_are_refused(package: str, name: str, reason: str, tmp_path: Path) -> None:
    built_in = getattr(importlib.import_module(package).callbacks, name)
    for kind in (built_in, type("Custom", (built_in,), {})):
        callback = object.__new__(kind)  # creating one may need a package that is not installed
        with pytest.raises(rk.OptionError, match=f"{kind.__name__} cannot run on several workers: {reason}"):
            rk.fit(model_of(package), X, Y, callbacks=callback, scale=TWO, run=rk.Run(storage=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_base_logger_fails_in_keras_too() -> None:
    import tf_keras

    with pytest.raises(KeyError, match="metrics"):
        model_of("tf_keras").fit(X, Y, callbacks=[tf_keras.callbacks.BaseLogger()], verbose=0)


@pytest.mark.parametrize("what", ["model", "callbacks", "transform"])
def test_module_missing_on_workers_is_reported(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{what}_is_only_here"  # Ray's processes have the import path from when Ray started
    code = """
    import keras

    class Custom(keras.callbacks.Callback):
        pass

    def build():
        ...

    def unchanged(columns):
        return columns
    """
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(name)
    pq.write_table(pa.table({"a": X[:, 0], "b": Y}), tmp_path / "a.parquet")
    model = module.build if what == "model" else functools.partial(model_of, "keras")
    transform = module.unchanged if what == "transform" else None
    source = rk.parquet(tmp_path / "a.parquet", x=["a"] * X.shape[1], y="b", transform=transform)
    callbacks = [module.Custom()] if what == "callbacks" else []
    run = rk.Run(storage=str(tmp_path))
    with pytest.raises(rk.UserCodeError, match=rf"No module named '{name}'\. Ship the module"):
        rk.fit(model, source, callbacks=callbacks, scale=TWO, run=run, verbose=0)
