"""`fit` in this process matches plain `model.fit`."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import hypothesis
import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import raykeras as rk
from raykeras.data.batch_spec import class_weights
from raykeras.data.plan import PassPlan, window_rows_for
from raykeras.data.sources.arrays import from_arrays
from raykeras.data.streaming.reader import SEGMENT_PASSES
from tests.support.compare import assert_same_training, assert_same_weights

ROWS, BATCH = 103, 16
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
W = RNG.uniform(0.2, 2, ROWS).astype(np.float32)


def build(**compiled: Any) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        inputs = keras.Input((4,), name="features")
        model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax", name="classes")(inputs))
        options = {"optimizer": keras.optimizers.Adam(0.05), "loss": "sparse_categorical_crossentropy"}
        model.compile(**{**options, "metrics": ["accuracy"], **compiled})
        return model

    return make


def plain(
    batches: Iterator[Any],
    epochs: int,
    steps: int,
    make: Callable[[], Any] | None = None,
    pass_steps: int | None = None,
    **options: Any,
) -> tuple[dict[str, list[float]], Any]:
    """Train in plain Keras on the given batches; return the history and the model.

    Args:
        batches: The batches of consecutive passes over the data.
        epochs, steps: Number of epochs, and of steps in each.
        make: Builds the model.
        pass_steps: Batches per pass, if an epoch ends with the pass; None if it continues in the next pass.
        options: Options of `Model.fit`.
    """
    keras.utils.set_random_seed(0)
    model = (make or build())()
    first = next(batches)
    signature = tuple(tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in first)

    rest = itertools.chain([first], batches)

    def one_pass() -> Iterator[Any]:
        return itertools.islice(rest, pass_steps)

    data = tf.data.Dataset.from_generator(one_pass, output_signature=signature)
    if pass_steps is not None:
        data = data.apply(tf.data.experimental.assert_cardinality(pass_steps))
    history = model.fit(data, epochs=epochs, steps_per_epoch=steps, verbose=0, shuffle=False, **options)
    return history.history, model


def planned(
    epochs: int, arrays: tuple[np.ndarray, ...], num_rows: int = ROWS, unit_rows: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the batches of arrays in memory, or of the given row units, in the planned order."""
    if unit_rows is None:
        unit_rows = from_arrays(X, Y).open().slice(0, num_rows).unit_rows
    for epoch in range(epochs):
        plan = PassPlan(unit_rows, global_batch_size=BATCH, window_rows=1 << 62, epoch=epoch)
        for step in range(plan.num_steps):
            yield tuple(array[plan.batch_rows(step)] for array in arrays)


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., rk.Result]:
    def call(model: Any, *data: Any, **options: Any) -> rk.Result:
        run = rk.Run(storage=str(tmp_path), name=f"run-{len(list(tmp_path.iterdir()))}")
        return rk.fit(model, *data, **{"batch_size": BATCH, "verbose": 0, "run": run, **options})

    return call


Fit = Callable[..., rk.Result]


def test_arrays_match_keras(fit: Fit) -> None:
    result = fit(build(), X, Y, sample_weight=W, epochs=3)
    assert_same_training(result, *plain(planned(3, (X, Y, W)), 3, 7))
    assert result.epoch == [0, 1, 2]
    assert result.params == {"epochs": 3, "steps": 7, "verbose": 0}


def test_unshuffled_arrays_match_keras(fit: Fit) -> None:
    result = fit(build(), X, Y, epochs=2, shuffle=False)
    keras.utils.set_random_seed(0)
    model = build()()
    history = model.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    assert_same_training(result, history.history, model)


def test_unshuffled_stream_of_many_windows_matches_keras(fit: Fit, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6_001, 1_000)).astype(np.float32)
    y, weight = rng.integers(0, 2, len(x)), rng.uniform(0.2, 2, len(x)).astype(np.float32)
    lists = pa.FixedSizeListArray.from_arrays(x.ravel(), x.shape[1])
    pq.write_table(pa.table({"x": lists, "y": y, "weight": weight}), tmp_path / "x.parquet", row_group_size=490)
    assert window_rows_for(x[0].nbytes) < len(x) / 2

    def wide() -> keras.Model:
        model = keras.Sequential([keras.Input((1_000,)), keras.layers.Dense(2, activation="softmax")])
        model.compile("adam", "sparse_categorical_crossentropy", weighted_metrics=["accuracy"])
        return model

    source = rk.parquet(tmp_path / "x.parquet", x="x", y="y", sample_weight="weight", cache=None)
    options = {"batch_size": 50, "epochs": 2, "shuffle": False, "verbose": 0}
    result = fit(wide, source, **options)
    keras.utils.set_random_seed(0)
    model = wide()
    history = model.fit(x, y, sample_weight=weight, **options)
    assert_same_training(result, history.history, model)


def test_stream_over_several_executions_matches_keras(fit: Fit, tmp_path: Path) -> None:
    rows = {"x": list(X), "y": Y, "weight": W}
    pq.write_table(pa.table(rows), tmp_path / "x.parquet", row_group_size=9)
    source = rk.parquet(tmp_path / "x.parquet", x="x", y="y", sample_weight="weight", cache=None)
    epochs = 2 * SEGMENT_PASSES + 2
    result = fit(build(), source, epochs=epochs)
    assert_same_training(result, *plain(planned(epochs, (X, Y, W), unit_rows=source.open().unit_rows), epochs, 7))


def test_validation_split_takes_last_rows(fit: Fit) -> None:
    result = fit(build(), X, Y, epochs=2, shuffle=False, validation_split=0.2)
    keras.utils.set_random_seed(0)
    model = build()()
    history = model.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, validation_split=0.2)
    assert_same_training(result, history.history, model)


def test_validation_counts_rows_once(fit: Fit) -> None:
    for steps in (None, 2):
        result = fit(build(), X, Y, epochs=2, validation_data=(X + 1, Y, W), validation_steps=steps)
        rows = slice(0, ROWS if steps is None else steps * BATCH)
        validation = (X[rows] + 1, Y[rows], W[rows])
        expected = plain(planned(2, (X, Y)), 2, 7, validation_data=validation, validation_batch_size=BATCH)
        assert_same_training(result, *expected)


@pytest.mark.filterwarnings("ignore:In Keras 3 an epoch ends:UserWarning")
@pytest.mark.parametrize("steps_per_execution", [1, 2])  # two does not divide the three steps of an epoch
def test_steps_per_epoch_continues_until_arrays_end(fit: Fit, steps_per_execution: int) -> None:
    result = fit(build(steps_per_execution=steps_per_execution), X, Y, epochs=5, steps_per_epoch=3)
    assert_same_training(result, *plain(planned(3, (X, Y)), 5, 3, pass_steps=7))  # 3, 3, 1, 3 and 3 steps
    assert result.epoch == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("steps_per_execution", [3, 7, 16])
def test_steps_per_execution_need_not_divide_epoch(fit: Fit, steps_per_execution: int, replicas: int) -> None:
    make, seen = build(steps_per_execution=steps_per_execution), []
    scale = rk.Scale(replicas_per_worker=replicas)
    result = fit(make, X, Y, epochs=3, validation_data=(X, Y), on_event=seen.append, scale=scale)
    options = {"validation_data": (X, Y), "validation_batch_size": BATCH}
    assert_same_training(result, *plain(planned(3, (X, Y)), 3, 7, build(), **options))
    assert [event.step for event in seen if isinstance(event, rk.EpochEnded)] == [7, 7, 7]
    for epoch in range(3):
        batches = [event for event in seen if isinstance(event, rk.BatchEnded) and event.epoch == epoch]
        assert sum(event.num_steps for event in batches) == batches[-1].step == 7


def test_custom_make_train_function_is_used(fit: Fit) -> None:
    calls: list[int] = []

    class Custom(keras.Model):
        def make_train_function(self, force: bool = False) -> None:
            super().make_train_function(force=True)
            function = self.train_function

            def counting(iterator: Any) -> Any:
                calls.append(1)
                return function(iterator)

            self.train_function = counting

    def make() -> keras.Model:
        inputs = keras.Input((4,), name="features")
        model = Custom(inputs, keras.layers.Dense(2, activation="softmax", name="classes")(inputs))
        options = {"metrics": ["accuracy"], "steps_per_execution": 3}
        model.compile(keras.optimizers.Adam(0.05), "sparse_categorical_crossentropy", **options)
        return model

    for replicas, num_calls in ((1, 9), (2, 21)):
        calls.clear()
        result = fit(make, X, Y, epochs=3, scale=rk.Scale(replicas_per_worker=replicas))
        assert_same_training(result, *plain(planned(3, (X, Y)), 3, 7, build()))
        assert len(calls) == num_calls


def test_callback_may_train_and_evaluate(fit: Fit) -> None:
    def trained(run: Callable[[keras.Model, list[Any]], Any]) -> list[Any]:
        seen = []

        class Between(keras.callbacks.Callback):
            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                seen.append(self.model.evaluate(X[:50], Y[:50], batch_size=10, verbose=0))

            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                if batch == 2:
                    seen.append(self.model.train_on_batch(X[:8], Y[:8]))

        keras.utils.set_random_seed(0)
        run(build(steps_per_execution=3)(), [Between()])
        return seen

    def plain(model: keras.Model, callbacks: list[Any]) -> Any:
        return model.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)

    values = trained(lambda model, callbacks: fit(model, X, Y, epochs=2, shuffle=False, callbacks=callbacks))
    np.testing.assert_allclose(values, trained(plain), rtol=1e-5)
    assert len(values) == 4


def test_class_weight_matches_keras(fit: Fit) -> None:
    result = fit(build(), X, Y, epochs=2, shuffle=False, class_weight={0: 0.5, 1: 3.0})
    keras.utils.set_random_seed(0)
    model = build()()
    weights = {0: 0.5, 1: 3.0}
    history = model.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, class_weight=weights)
    assert_same_training(result, history.history, model)


@hypothesis.given(hnp.arrays(np.int64, st.integers(1, 30), elements=st.integers(0, 4)))
def test_class_weights_of_every_label_form_match_keras(labels: np.ndarray) -> None:
    from keras.src.trainers.data_adapters.data_adapter_utils import class_weight_to_sample_weights

    weights = {0: 2.0, 3: 0.25}
    for y in (labels, labels[:, None], np.eye(5)[labels]):
        expected = class_weight_to_sample_weights(y, weights)
        np.testing.assert_array_equal(class_weights(y, list(weights.items())), expected)


def test_zero_weight_rows_do_not_contribute(fit: Fit, tmp_path: Path) -> None:
    half = np.arange(ROWS) % 2 == 0
    table = pa.table({**{f"f{i}": X[:, i] for i in range(4)}, "y": Y, "w": half.astype(np.float32)})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=20)
    source = rk.parquet(tmp_path / "rows.parquet", x=[f"f{i}" for i in range(4)], y="y", sample_weight="w")
    result = fit(build(metrics=[]), source, epochs=3, shuffle=False)

    keras.utils.set_random_seed(0)
    model = build(metrics=[])()
    for _ in range(3):
        for first in range(0, ROWS, BATCH):
            rows = np.arange(first, min(first + BATCH, ROWS))
            used = rows[half[rows]]
            with tf.GradientTape() as tape:
                loss = keras.losses.sparse_categorical_crossentropy(Y[used], model(X[used]))
                loss = tf.reduce_sum(loss) / len(rows)
            gradients = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    assert_same_weights(result.model(), model)


def test_compiled_model_is_trained_in_place(fit: Fit) -> None:
    keras.utils.set_random_seed(0)
    model = build()()
    stopping = keras.callbacks.EarlyStopping("loss", patience=1, min_delta=100)
    result = fit(model, X, Y, epochs=9, callbacks=[stopping])
    assert result.model() is model
    assert int(model.optimizer.iterations) == 2 * 7
    assert stopping.stopped_epoch == 1
    assert result.epoch == [0, 1]


def test_compiled_model_on_two_replicas_is_trained_in_place(fit: Fit) -> None:
    keras.utils.set_random_seed(0)
    model = build()()
    result = fit(model, X, Y, epochs=2, scale=rk.Scale(replicas_per_worker=2))
    assert result.model() is model
    assert int(model.optimizer.iterations) == 2 * 7
    assert_same_training(result, *plain(planned(2, (X, Y)), 2, 7))


def test_events_reach_driver_and_run_folder(fit: Fit) -> None:
    seen: list[rk.Event] = []
    hooks: list[str] = []

    class Hooks(rk.DriverCallback):
        def on_train_begin(self, logs: dict[str, float]) -> None:
            hooks.append("train_begin")

        def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
            hooks.append(f"epoch_end {epoch} {'val_loss' in logs}")

        def on_train_end(self, logs: dict[str, float]) -> None:
            hooks.append("train_end")

    result = fit(build(), X, Y, epochs=2, validation_data=(X, Y), callbacks=[Hooks()], on_event=seen.append)
    phases = [event.phase for event in seen if isinstance(event, rk.PhaseStarted)]
    assert phases == ["metadata", "workers", "build", "compile", "train"]
    unordered = ("BatchEnded", "CheckpointSaved", "PhaseStarted", "WorkerStepsEnded")
    kinds = [event.kind for event in seen if event.kind not in unordered]
    epoch = ["EpochStarted", "ValidationEnded", "EpochEnded"]
    assert kinds == ["RunStarted", *epoch, *epoch, "RunEnded"]
    saved = [event.epoch for event in seen if isinstance(event, rk.CheckpointSaved)]  # announced asynchronously
    assert saved == [0, 1]
    batches = [event for event in seen if isinstance(event, rk.BatchEnded)]
    assert sum(batch.num_steps for batch in batches) == 14
    assert hooks == ["train_begin", "epoch_end 0 True", "epoch_end 1 True", "train_end"]
    folder = Path(result.path)
    written = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    without_batches = [event["event"] for event in written if event["event"] != "BatchEnded"]  # which may be merged
    assert without_batches == [event.kind for event in seen if event.kind != "BatchEnded"]
    rows = list(csv.DictReader((folder / "history.csv").open()))
    np.testing.assert_allclose([float(row["val_loss"]) for row in rows], result.history["val_loss"])


def test_on_event_exception_reaches_caller(fit: Fit) -> None:
    def fails(event: rk.Event) -> None:
        raise LookupError("in on_event")

    with pytest.raises(LookupError, match="in on_event"):
        fit(build(), X, Y, on_event=fails)


def test_checkpoints_open_with_keras(fit: Fit, tmp_path: Path) -> None:
    run = rk.Run(storage=str(tmp_path), name="kept", keep=2)
    result = fit(build(), X, Y, epochs=4, run=run, validation_data=(X, Y))
    assert [checkpoint.epoch for checkpoint in result.checkpoints] == [3, 4]
    newest = result.checkpoints[-1]
    assert sorted(path.name for path in Path(newest.path).iterdir()) == [
        "model.keras",
        "state.npz",
        "train_state.json",
    ]
    model = keras.models.load_model(f"{newest.path}/model.keras")
    for loaded, trained in zip(model.get_weights(), result.model().get_weights(), strict=True):
        np.testing.assert_array_equal(loaded, trained)
    assert int(model.optimizer.iterations) == 4 * 7
    best = int(np.argmin(result.history["val_loss"][2:])) + 3
    assert result.best_checkpoint().epoch == best
    with pytest.raises(rk.CheckpointError, match=r"got 'val_lost'. Metrics: accuracy, loss"):
        result.best_checkpoint("val_lost")


def test_last_checkpoint_is_always_kept(fit: Fit, tmp_path: Path) -> None:
    result = fit(build(), X, Y, epochs=3, run=rk.Run(storage=str(tmp_path), name="r", checkpoint_every=None))
    assert [checkpoint.epoch for checkpoint in result.checkpoints] == [3]


def test_run_folder_on_fsspec_storage(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    result = fit(build(), X, Y, epochs=2, run=rk.Run(storage="memory://runs", name="m"))
    assert [checkpoint.epoch for checkpoint in result.checkpoints] == [1, 2]
    loaded = result.checkpoints[-1].load_model()
    np.testing.assert_array_equal(loaded.get_weights()[0], result.model().get_weights()[0])
    assert "RunEnded" in fsspec.filesystem("memory").cat("/runs/m/events.jsonl").decode()
    assert not [path for path in temporary.iterdir() if path.suffix != ".py"]  # except TensorFlow's generated code


def test_inputs_and_outputs_by_name_match_keras(fit: Fit) -> None:
    def two() -> keras.Model:
        a, b = keras.Input((4,), name="a"), keras.Input((1,), name="b")
        joined = keras.layers.Concatenate()([a, b])
        outputs = {
            "score": keras.layers.Dense(1, name="score")(joined),
            "cls": keras.layers.Dense(2, activation="softmax", name="cls")(joined),
        }
        model = keras.Model({"a": a, "b": b}, outputs)
        model.compile("adam", {"score": "mse", "cls": "sparse_categorical_crossentropy"})
        return model

    x, y = {"a": X, "b": W}, {"score": X[:, 1], "cls": Y}
    result = fit(two, x, y, epochs=2, shuffle=False)
    keras.utils.set_random_seed(0)
    model = two()
    history = model.fit({"a": X, "b": W}, y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    assert_same_training(result, history.history, model)


def test_batch_of_fewer_rows_than_replicas_matches_keras(fit: Fit) -> None:
    options: dict[str, Any] = {"batch_size": 1, "epochs": 2, "validation_data": (X[:7], Y[:7]), "shuffle": False}
    with pytest.warns(UserWarning, match="got 1 and 2 replicas, so some receive no rows"):
        result = fit(build(), X[:11], Y[:11], **options, scale=rk.Scale(replicas_per_worker=2))
    keras.utils.set_random_seed(0)
    model = build()()
    history = model.fit(X[:11], Y[:11], **options, verbose=0)
    assert_same_training(result, history.history, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1; got 0"),
        ({"epochs": -1}, "`epochs` must be a whole number of at least 0; got -1"),
        ({"initial_epoch": 0.5}, "`initial_epoch` must be"),
        ({"validation_split": 1.5}, "`validation_split` must be above 0 and below 1"),
        ({"validation_data": (X, Y, W, W)}, "`validation_data` must be"),
        ({"callbacks": [keras.callbacks.EarlyStopping]}, "`callbacks` must be callback objects"),
        ({"verbose": 5}, "`verbose`"),
        ({"class_weight": {"a": 1.0}}, "`class_weight` must map classes"),
    ],
)
def test_invalid_arguments_are_refused(fit: Fit, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(rk.OptionError, match=message):
        fit(build(), X, Y, **options)
    assert not list(tmp_path.iterdir())


def test_unused_keys_of_x_are_ignored(fit: Fit) -> None:
    expected = fit(build(), {"features": X}, Y).history
    with pytest.warns(UserWarning, match="got other as well, which the model ignores. Inputs: features"):
        assert fit(build(), {"features": X, "other": W}, Y).history == expected
    data = tf.data.Dataset.from_tensor_slices(({"features": X, "other": W}, Y)).batch(BATCH)
    with pytest.warns(UserWarning, match="got other as well"):
        assert fit(build(), data, shuffle=False).epoch == [0]


def test_bfloat16_tensors_train_as_float32(fit: Fit) -> None:
    x = tf.cast(X, tf.bfloat16)
    assert fit(build(), x, Y).history == fit(build(), tf.cast(x, tf.float32), Y).history


@pytest.mark.parametrize("options", [{"epochs": 0}, {"epochs": 2, "initial_epoch": 2}], ids=["zero", "past"])
def test_zero_epochs_train_nothing(fit: Fit, options: dict[str, Any], tmp_path: Path) -> None:
    called: list[str] = []

    class Recorder(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            called.append("begin")

        def on_train_end(self, logs: Any = None) -> None:
            called.append("end")

    run = rk.Run(storage=str(tmp_path), name="none")
    keras.utils.set_random_seed(0)
    model = build()()
    history = model.fit(X, Y, verbose=0, **options)
    result = fit(build(), X, Y, callbacks=[Recorder()], run=run, **options)
    assert result.history == history.history == {} and result.epoch == []
    assert called == ["begin", "end"]
    assert_same_weights(result.checkpoints[-1].load_model(), model)
    assert fit(build(), X, Y, run=run, epochs=3).epoch == list(range(options.get("initial_epoch", 0), 3))


def test_validation_data_may_be_a_list(fit: Fit) -> None:
    expected = fit(build(), X, Y, validation_data=(X[:29], Y[:29])).history
    assert fit(build(), X, Y, validation_data=[X[:29], Y[:29]]).history == expected


def test_second_run_of_same_name_is_refused_without_resume(fit: Fit, tmp_path: Path) -> None:
    run = rk.Run(storage=str(tmp_path), name="once", resume=None)
    fit(build(), X, Y, run=run)
    with pytest.raises(rk.OptionError, match="needs an empty folder"):
        fit(build(), X, Y, run=run)


def uncompiled() -> keras.Model:
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (uncompiled, (X, Y), "must be compiled"),
        (build(), (X, None), "compiled with a loss needs y"),
        (build(), ({"feature": X}, Y), r"got 'feature'. Did you mean 'features'\?"),
        (build(), (X[:, :3], Y), r"input 'features' takes 4 per row and column 'x' has 3"),
        (build(), (X, {"class": Y}), r"got 'class'. Did you mean 'classes'\?"),
        (lambda: 3, (X, Y), "must be a keras.Model"),
    ],
)
def test_model_must_match_data(fit: Fit, make: Any, data: Any, message: str) -> None:
    with pytest.raises(rk.ModelError, match=message):
        fit(make, *data)


def test_missing_tf_keras_error_names_extra(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    monkeypatch.setitem(sys.modules, "tf_keras", None)
    with pytest.raises(rk.ModelError, match=r"has no tf_keras\. Install `raykeras\[legacy\]`"):
        fit(build(), X, Y)


def failing_loss(y_true: Any, y_pred: Any) -> Any:
    return {}["in the loss"]


class FailingCallback(keras.callbacks.Callback):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        raise ZeroDivisionError("in the callback")


def failing_build() -> Any:
    raise OverflowError("in build")


@pytest.mark.parametrize(
    ("make", "callbacks", "cause", "where"),
    [
        (build(loss=failing_loss), [], "KeyError", "failing_loss"),
        (build(), [FailingCallback()], "ZeroDivisionError", "on_epoch_end"),
        (failing_build, [], "OverflowError", "failing_build"),
    ],
)
def test_user_exception_keeps_user_traceback(fit: Fit, make: Any, callbacks: list[Any], cause: str, where: str) -> None:
    with pytest.raises(rk.UserCodeError) as caught:
        fit(make, X, Y, callbacks=callbacks)
    error = caught.value
    assert error.cause == f"builtins.{cause}"
    assert error.rank == 0
    assert where in error.user_traceback
    assert "site-packages" not in error.user_traceback
    assert len(error.user_traceback.splitlines()) < 12


def test_transform_module_missing_on_workers_is_reported(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def unchanged(columns):\n    return columns\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    unchanged = importlib.import_module("only_here").unchanged
    pq.write_table(pa.table({"a": np.ones(100)}), tmp_path / "a.parquet")
    source = rk.parquet(tmp_path / "a.parquet", x=["a", "a", "a", "a"], y="a", transform=unchanged)
    with pytest.raises(rk.UserCodeError, match=r"ModuleNotFoundError: No module named 'only_here'.* Ship the module"):
        fit(build(), source)


def test_null_in_stream_names_file_and_row_group(fit: Fit, tmp_path: Path) -> None:
    values = pa.array([1.0] * 70 + [None] + [1.0] * 29)
    pq.write_table(pa.table({"a": values}), tmp_path / "n.parquet", row_group_size=20, write_statistics=False)
    make = build()
    with pytest.raises(rk.ColumnError, match=r"column 'a' has 1 in file .*n\.parquet, row group 3"):
        fit(make, rk.parquet(tmp_path / "n.parquet", x=["a", "a", "a", "a"], y="a"), epochs=2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_weight_is_refused_before_start(fit: Fit, tmp_path: Path, bad: float) -> None:
    for number, weights in enumerate(([1.0] * 50, [-1.0] * 30 + [bad] + [1.0] * 19)):
        pq.write_table(pa.table({"a": [1.0] * 50, "w": weights}), tmp_path / f"{number}.parquet", row_group_size=20)
    source = rk.parquet(tmp_path / "*.parquet", x=["a", "a", "a", "a"], y="a", sample_weight="w")
    with pytest.raises(rk.ColumnError, match=r"'w' holds (nan|inf) at row 10 of file .*1\.parquet, row group 1"):
        fit(build(), source)
    assert {path.suffix for path in tmp_path.iterdir()} == {".parquet"}


def test_epoch_order_is_independent_of_initial_epoch(tmp_path: Path) -> None:
    """Two epochs in one run equal one epoch in each of two runs."""
    x, y = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32), np.arange(50) % 2

    def build() -> Any:
        import keras

        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2, activation="softmax")])
        model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy")
        return model

    run = rk.Run(storage=str(tmp_path))  # runs that start in the same second get different names
    both = rk.fit(build, x, y, epochs=2, verbose=0, run=run)
    first = rk.fit(build, x, y, epochs=1, verbose=0, run=run)
    second = rk.fit(first.model(), x, y, epochs=2, initial_epoch=1, verbose=0, run=run)
    assert first.history["loss"] + second.history["loss"] == both.history["loss"]
    assert second.epoch == [1]
    assert_same_weights(second.model(), both.model(), rtol=0, atol=0)
