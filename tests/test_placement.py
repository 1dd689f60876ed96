"""Every built-in callback has on two workers the effect that it has in one process."""

from __future__ import annotations

import csv
import functools
import http.server
import importlib
import inspect
import json
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.placement import PLACEMENTS, placement_of
from tests.kept import TWO

ROWS, BATCH = 70, 16  # five steps, the last one short
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
VALIDATION = (X[:21] + 0.1, Y[:21])

pytestmark = pytest.mark.usefixtures("two_workers")
PACKAGES = pytest.mark.parametrize("package", ["keras", "tf_keras"])


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


def assert_as_plain(package: str, mine: Any, plain: Any, folder: Path, data: Any = (X, Y), **options: Any) -> rk.Result:
    """Trains with `mine` on two workers and with `plain` in plain Keras; history and weights agree."""
    compiled = options.pop("compiled", {})
    options = {"batch_size": BATCH, "epochs": 4, "shuffle": False, "verbose": 0, **options}
    model, oracle = model_of(package, **compiled), model_of(package, **compiled)
    expected = oracle.fit(*data, callbacks=plain, **options).history
    run = rk.Run(storage=str(folder), name="run")
    result = rk.fit(model, *data, callbacks=mine, scale=TWO, run=run, **options)
    assert set(result.history) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(result.history[name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    for ours, theirs in zip(model.get_weights(), oracle.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    return result


@PACKAGES
def test_every_built_in_callback_has_a_place(package: str) -> None:
    module = importlib.import_module(package).callbacks
    for name, value in inspect.getmembers(module, inspect.isclass):
        assert name in PLACEMENTS, f"{package} has a new callback: {name}"
        if name != "CallbackList":
            assert issubclass(value, module.Callback)
    own = type("Own", (module.EarlyStopping,), {})
    assert placement_of(own()) == "every"
    assert placement_of(type("Own", (module.CSVLogger,), {})("x.csv")) == "chief"
    assert placement_of(rk.on_chief(own())) == "chief"


@PACKAGES
def test_early_stopping_restores_the_best_weights(package: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks
    options = {"monitor": "val_loss", "min_delta": 0.05, "patience": 1, "restore_best_weights": True}
    mine, plain = (callbacks.EarlyStopping(**options, start_from_epoch=1) for _ in range(2))
    result = assert_as_plain(package, mine, [plain], tmp_path, epochs=12, validation_data=VALIDATION)
    assert len(result.epoch) < 12
    restored = result.checkpoints[-1].load_model()  # the newest checkpoint is of the model that fit left
    for ours, theirs in zip(restored.get_weights(), plain.model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert (mine.stopped_epoch, mine.best_epoch, mine.wait) == (plain.stopped_epoch, plain.best_epoch, plain.wait)
    assert mine.best == pytest.approx(plain.best, rel=1e-5)


@PACKAGES
def test_reduce_lr_on_plateau(package: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks
    options = {"monitor": "loss", "min_delta": 10, "factor": 0.5, "patience": 1}
    mine, plain = (callbacks.ReduceLROnPlateau(**options) for _ in range(2))
    result = assert_as_plain(package, mine, [plain], tmp_path)
    rates = result.history["lr" if package == "tf_keras" else "learning_rate"]
    assert rates[0] > rates[-1]


@PACKAGES
def test_learning_rate_scheduler(package: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks
    schedule = lambda epoch, rate: rate * 0.5 if epoch else rate  # noqa: E731
    mine, plain = (callbacks.LearningRateScheduler(schedule) for _ in range(2))
    assert_as_plain(package, mine, [plain], tmp_path)


@PACKAGES
def test_terminate_on_nan(package: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks
    spoilt = X.copy()
    spoilt[2 * BATCH + 3] = np.nan  # the third of five steps

    class Counts(callbacks.Callback):
        batches = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.batches += 1

    mine, plain = Counts(), Counts()
    data = (spoilt, Y)
    assert_as_plain(
        package, [callbacks.TerminateOnNaN(), mine], [callbacks.TerminateOnNaN(), plain], tmp_path, data=data
    )
    assert mine.batches == plain.batches == 3


@PACKAGES
def test_model_checkpoint_keeps_the_best(package: str, tmp_path: Path) -> None:
    keras = importlib.import_module(package)

    def checkpoint(folder: str) -> Any:
        return keras.callbacks.ModelCheckpoint(
            f"{folder}/mymodel_{{epoch}}.keras", save_best_only=True, monitor="val_loss"
        )

    mine = checkpoint("best")
    assert_as_plain(package, mine, [checkpoint(str(tmp_path / "plain"))], tmp_path, validation_data=VALIDATION)
    assert mine.filepath == "best/mymodel_{epoch}.keras"
    saved = sorted((tmp_path / "run" / "artifacts" / "best").iterdir())
    assert [path.name for path in saved] == sorted(path.name for path in (tmp_path / "plain").iterdir())
    ours, theirs = (
        keras.models.load_model(folder / saved[-1].name) for folder in (saved[0].parent, tmp_path / "plain")
    )
    np.testing.assert_allclose(ours.predict(X, verbose=0), theirs.predict(X, verbose=0), rtol=1e-4, atol=1e-6)
    stored = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert sorted(e["path"] for e in stored if e["event"] == "ArtifactSaved") == [str(path) for path in saved]


@PACKAGES
def test_model_checkpoint_every_few_batches_is_named_by_its_loss(package: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks
    folders = [tmp_path / "mine", tmp_path / "plain"]
    mine, plain = (callbacks.ModelCheckpoint(f"{f}/model-loss={{loss:.2f}}.keras", save_freq=3) for f in folders)
    assert_as_plain(package, mine, [plain], tmp_path)
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert len(names[0]) > 3
    assert names[0] == names[1]


@PACKAGES
def test_backup_and_restore_goes_on_where_it_stopped(package: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks

    class Breaks(callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise ArithmeticError("broken off")

    model, oracle = model_of(package), model_of(package)
    folders = [str(tmp_path / name) for name in ("mine", "plain")]
    options = {"batch_size": BATCH, "epochs": 4, "shuffle": False, "verbose": 0}
    with pytest.raises(rk.UserCodeError, match="broken off"):
        mine = [callbacks.BackupAndRestore(folders[0]), Breaks()]
        rk.fit(model, X, Y, callbacks=mine, scale=TWO, run=rk.Run(storage=str(tmp_path), name="broken"), **options)
    with pytest.raises(ArithmeticError):
        oracle.fit(X, Y, callbacks=[callbacks.BackupAndRestore(folders[1]), Breaks()], **options)
    assert Path(folders[0]).exists()
    again, plain = (callbacks.BackupAndRestore(folder) for folder in folders)
    result = assert_as_plain(package, again, [plain], tmp_path)
    assert result.epoch == [2, 3]
    assert Path(folders[0]).exists() == Path(folders[1]).exists()


@PACKAGES
def test_csv_logger(package: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks
    mine, plain = callbacks.CSVLogger("log.csv"), callbacks.CSVLogger(str(tmp_path / "plain.csv"))
    assert_as_plain(package, mine, [plain], tmp_path, validation_data=VALIDATION)
    rows = []
    for path in (tmp_path / "run" / "artifacts" / "log.csv", tmp_path / "plain.csv"):
        with open(path, newline="") as file:
            rows.append([{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)])
    assert len(rows[0]) == 4
    for ours, theirs in zip(*rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@PACKAGES
def test_tensorboard_with_histograms(package: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callbacks = importlib.import_module(package).callbacks
    mine = callbacks.TensorBoard("logs", histogram_freq=1, write_graph=False)
    plain = callbacks.TensorBoard(str(tmp_path / "plain"), histogram_freq=1, write_graph=False)
    assert_as_plain(package, mine, [plain], tmp_path, validation_data=VALIDATION)
    for part in ("train", "validation"):
        read = []
        for folder in (tmp_path / "run" / "artifacts" / "logs", tmp_path / "plain"):
            accumulator = EventAccumulator(str(folder / part))
            accumulator.Reload()
            tags = accumulator.Tags()["tensors"]
            read.append({tag: [event.step for event in accumulator.Tensors(tag)] for tag in tags})
        assert read[0]["epoch_loss"] == [0, 1, 2, 3]
        assert len(read[0]) == len(read[1])  # histograms are named by layers, whose names count up
        assert sorted(read[0].values()) == sorted(read[1].values())
        assert any("kernel" in tag for tag in read[0]) == (part == "train")


def test_swap_ema_weights(tmp_path: Path) -> None:
    import keras

    mine, plain = (keras.callbacks.SwapEMAWeights(swap_on_epoch=True) for _ in range(2))
    compiled = {"use_ema": True, "ema_momentum": 0.9}
    assert_as_plain("keras", mine, [plain], tmp_path, compiled=compiled, validation_data=VALIDATION)


@PACKAGES
def test_lambda_callback_runs_on_every_worker(package: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks

    def write(epoch: int, logs: Any) -> None:
        import ray.train

        path = tmp_path / f"rank-{ray.train.get_context().get_world_rank()}"
        path.write_text(json.dumps({"epoch": epoch, "loss": float(logs["loss"])}))

    result = assert_as_plain(package, callbacks.LambdaCallback(on_epoch_end=write), None, tmp_path)
    told = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0] == pytest.approx({"epoch": 3, "loss": result.history["loss"][-1]})


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address on this machine, and what is sent there."""
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


@PACKAGES
def test_remote_monitor_tells_once(package: str, tmp_path: Path, server: tuple[str, list[dict[str, Any]]]) -> None:
    callbacks = importlib.import_module(package).callbacks
    address, received = server
    mine = callbacks.RemoteMonitor(root=address, send_as_json=True)
    result = assert_as_plain(package, mine, None, tmp_path)
    assert [told["epoch"] for told in received] == [0, 1, 2, 3]
    assert [told["loss"] for told in received] == pytest.approx(result.history["loss"])


@PACKAGES
def test_keras_own_recorders_may_be_passed_too(package: str, tmp_path: Path) -> None:
    keras = importlib.import_module(package)
    recorder = keras.callbacks.History()
    mine = [recorder, keras.callbacks.ProgbarLogger()]
    result = assert_as_plain(package, mine, None, tmp_path)
    assert recorder.epoch == result.epoch
    for name, values in result.history.items():
        assert recorder.history[name] == pytest.approx(values)


@PACKAGES
def test_a_callback_of_ones_own_is_filled_on_the_users_object(package: str, tmp_path: Path) -> None:
    """The guide's `LossHistory`."""
    callbacks = importlib.import_module(package).callbacks

    class LossHistory(callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            self.per_batch_losses: list[float] = []

        def on_batch_end(self, batch: int, logs: Any = None) -> None:
            self.per_batch_losses.append(logs.get("loss"))

    mine, plain = LossHistory(), LossHistory()
    assert_as_plain(package, mine, [plain], tmp_path)
    assert len(mine.per_batch_losses) == 4 * 5
    np.testing.assert_allclose(mine.per_batch_losses, plain.per_batch_losses, rtol=1e-5)


def stopper(callbacks: Any, at: int, only_rank: int | None = None) -> Any:
    class Stops(callbacks.Callback):
        batches = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            import ray.train

            self.batches += 1
            if self.batches == at and only_rank in (None, ray.train.get_context().get_world_rank()):
                self.model.stop_training = True

    return Stops()


@PACKAGES
def test_a_stop_that_all_want_comes_at_once(package: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks

    class Stops(callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = batch == 2

    mine = stopper(callbacks, at=3)
    assert_as_plain(package, mine, [Stops()], tmp_path)
    assert mine.batches == 3


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("at", [3, 5])  # in the middle of an epoch, and at its end
def test_a_stop_that_one_worker_wants_comes_at_one_step_for_all(rank: int, at: int, tmp_path: Path) -> None:
    import keras

    class Stops(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = self.seen() == mine.batches

        def seen(self) -> int:
            self.batches = getattr(self, "batches", 0) + 1
            return self.batches

    mine = stopper(keras.callbacks, at, only_rank=rank)
    model, oracle = model_of("keras"), model_of("keras")
    options = {"batch_size": BATCH, "epochs": 4, "shuffle": False, "verbose": 0, "validation_data": VALIDATION}
    result = rk.fit(model, X, Y, callbacks=mine, scale=TWO, run=rk.Run(storage=str(tmp_path)), **options)
    assert at <= mine.batches <= at + 1  # the others may have begun another step
    expected = oracle.fit(X, Y, callbacks=[Stops()], **options).history
    assert len(expected["loss"]) == len(result.history["loss"])
    for name, values in expected.items():
        np.testing.assert_allclose(result.history[name], values, rtol=1e-5, atol=1e-7, err_msg=name)
    for ours, theirs in zip(model.get_weights(), oracle.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_on_chief_runs_once_and_its_stop_stops_all(tmp_path: Path) -> None:
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

    mine = Once()
    model = model_of("keras")
    run = rk.Run(storage=str(tmp_path / "runs"))
    options = {"batch_size": BATCH, "epochs": 9, "verbose": 0}
    result = rk.fit(model, X, Y, callbacks=[rk.on_chief(mine)], scale=TWO, run=run, **options)
    assert mine.ranks[:2] == [0, 0]
    assert len(result.epoch) < 9
    assert {path.name[-6:] for path in tmp_path.glob("epoch-*")} == {"rank-0"}


@PACKAGES
def test_a_callback_that_was_used_before_is_used_again(package: str, tmp_path: Path) -> None:
    callbacks = importlib.import_module(package).callbacks
    mine = [callbacks.EarlyStopping("loss"), callbacks.TensorBoard("logs")]
    model = model_of(package)
    for name, scale in (("here", rk.Scale()), ("there", TWO)):
        for callback in mine:
            if name == "here" and hasattr(callback, "log_dir"):
                callback.log_dir = str(tmp_path / "logs")
        run = rk.Run(storage=str(tmp_path), name=name)
        result = rk.fit(model, X, Y, epochs=1, verbose=0, callbacks=mine, scale=scale, run=run)
        assert result.epoch == [0]


def test_a_callback_that_cannot_be_pickled_is_refused_by_the_name_of_its_attribute(tmp_path: Path) -> None:
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
        ("keras", "OrbaxCheckpoint", "it saves by means of JAX"),
        ("tf_keras", "BaseLogger", "it reads what `fit` no longer gives"),
        ("tf_keras", "SidecarEvaluatorModelExport", "it is for `keras.utils.SidecarEvaluator`"),
    ],
)
def test_what_cannot_run_on_several_workers_is_refused(package: str, name: str, reason: str, tmp_path: Path) -> None:
    built_in = getattr(importlib.import_module(package).callbacks, name)
    for kind in (built_in, type("Own", (built_in,), {})):
        callback = object.__new__(kind)  # making one may need a package that is not there
        with pytest.raises(rk.OptionError, match=f"{kind.__name__} cannot run on several workers: {reason}"):
            rk.fit(model_of(package), X, Y, callbacks=callback, scale=TWO, run=rk.Run(storage=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_base_logger_is_of_no_use_in_one_process_either() -> None:
    import tf_keras

    with pytest.raises(KeyError, match="metrics"):
        model_of("tf_keras").fit(X, Y, callbacks=[tf_keras.callbacks.BaseLogger()], verbose=0)


@pytest.mark.parametrize("what", ["model", "callbacks", "transform"])
def test_what_the_workers_cannot_import_is_an_error(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"{what}_is_only_here"  # Ray's processes have the paths of when they were started
    code = """
    import keras

    class Mine(keras.callbacks.Callback):
        pass

    def build():
        ...

    def unchanged(columns):
        return columns
    """
    (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = importlib.import_module(module)
    pq.write_table(pa.table({"a": X[:, 0], "b": Y}), tmp_path / "a.parquet")
    model = mine.build if what == "model" else functools.partial(model_of, "keras")
    source = rk.parquet(
        tmp_path / "a.parquet", x=["a"] * X.shape[1], y="b", transform=mine.unchanged if what == "transform" else None
    )
    with pytest.raises(rk.UserCodeError, match=rf"No module named '{module}'\. Send the module along"):
        rk.fit(
            model,
            source,
            callbacks=[mine.Mine()] if what == "callbacks" else [],
            scale=TWO,
            run=rk.Run(storage=str(tmp_path)),
            verbose=0,
        )
