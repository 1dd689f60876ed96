"""`evaluate` and `predict`, in this process and on workers, match plain Keras."""

from __future__ import annotations

import importlib
import logging
import re
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

import raykeras as rk
from tests.support.models import TWO

ROWS, BATCH = 103, 16
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 4)).astype(np.float32)
Y = (X[:, :1] > 0).astype(np.float32)
W = RNG.uniform(0.2, 2, ROWS).astype(np.float32)
NAMES = [f"f{i}" for i in range(4)]
TWO_REPLICAS = rk.Scale(replicas_per_worker=2)
SCALES = pytest.mark.parametrize("scale", [rk.Scale(), TWO_REPLICAS, TWO], ids=["local", "two replicas", "two workers"])
ONE_AND_TWO_WORKERS = pytest.mark.parametrize("scale", [rk.Scale(), TWO], ids=["local", "two workers"])


def build() -> Any:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,), name="features")
    hidden = keras.layers.Dense(5, activation="relu")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid", name="risk")(hidden))
    metrics = ["accuracy", keras.metrics.AUC(name="auc")]
    model.compile("adam", "binary_crossentropy", metrics=metrics, weighted_metrics=[keras.metrics.AUC(name="wauc")])
    return model


def two_outputs() -> Any:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,), name="features")
    return keras.Model(inputs, {"a": keras.layers.Dense(3)(inputs), "b": keras.layers.Dense(1)(inputs)})


@pytest.fixture
def source(tmp_path: Path) -> rk.Source:
    columns = {name: X[:, i] for i, name in enumerate(NAMES)}
    table = pa.table({**columns, "y": Y[:, 0], "w": W, "id": np.arange(ROWS), "tag": [f"row {i}" for i in range(ROWS)]})
    (tmp_path / "data").mkdir()
    for part in range(2):
        pq.write_table(table.slice(part * 60, 60), tmp_path / "data" / f"{part}.parquet", row_group_size=25)
    return rk.parquet(tmp_path / "data", x=NAMES, y=["y"], sample_weight="w")


@pytest.mark.usefixtures("two_workers")
@SCALES
def test_evaluate_counts_every_row_once(source: rk.Source, scale: rk.Scale) -> None:
    model = build()
    expected = model.evaluate(X, Y, sample_weight=W, batch_size=BATCH, verbose=0, return_dict=True)
    logs = rk.evaluate(model, source, batch_size=BATCH, scale=scale)
    assert list(logs) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(logs[name], value, rtol=1e-5, err_msg=name)


def test_evaluate_with_steps_matches_keras(capsys: pytest.CaptureFixture[str]) -> None:
    model = build()
    expected = model.evaluate(X[:32], Y[:32], batch_size=BATCH, verbose=0)
    values = rk.evaluate(build, X, Y, batch_size=BATCH, steps=2, return_dict=False)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert re.fullmatch(rf"2/2 - \d+\.\ds - loss: {values[0]:.4f} - .*\n", capsys.readouterr().out)
    rk.evaluate(build, X, Y, batch_size=BATCH, steps=2, verbose=0)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("two_workers")
@SCALES
def test_evaluate_calls_callbacks(scale: rk.Scale) -> None:
    class Recorder(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            self.calls.append(batch)

        def on_test_end(self, logs: Any = None) -> None:
            self.calls.append(sorted(logs))

    mine, expected = Recorder(), Recorder()
    build().evaluate(X, Y, batch_size=BATCH, callbacks=[expected], verbose=0)
    rk.evaluate(build, X, Y, batch_size=BATCH, callbacks=[mine], scale=scale)
    assert mine.calls == expected.calls


def test_evaluate_lists_metrics_in_order_of_compile() -> None:
    model = build()
    for metrics in (["mse", "mae"], ["mae", "mse"]):
        model.compile("sgd", "binary_crossentropy", metrics=metrics)
        expected = model.evaluate(X, Y, batch_size=BATCH, verbose=0)
        np.testing.assert_allclose(rk.evaluate(model, X, Y, batch_size=BATCH, return_dict=False), expected, rtol=1e-5)


def test_predict_calls_callbacks_like_keras(source: rk.Source) -> None:
    class Recorder(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        def on_predict_begin(self, logs: Any = None) -> None:
            self.calls.append("begin")

        def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
            self.calls.append((batch, logs["outputs"].shape))

        def on_predict_end(self, logs: Any = None) -> None:
            self.calls.append("end")

    for steps_per_execution in (1, 3):
        mine, expected, streamed = Recorder(), Recorder(), Recorder()
        model = build()
        model.compile(steps_per_execution=steps_per_execution)
        model.predict(X, batch_size=BATCH, callbacks=[expected], verbose=0)
        rk.predict(model, X, batch_size=BATCH, callbacks=[mine])
        assert mine.calls == expected.calls
    rk.predict(build, source, batch_size=BATCH, callbacks=streamed)
    assert [call[0] for call in streamed.calls[1:-1]] == list(range(len(streamed.calls) - 2))
    for function in (rk.evaluate, rk.predict):
        with pytest.raises(rk.OptionError, match="since only `fit` sends events; got a DriverCallback"):
            function(model, X, callbacks=[rk.DriverCallback()])
    with pytest.raises(rk.OptionError, match="`callbacks` of `predict` need the model in this process"):
        rk.predict(build, X, callbacks=[mine], scale=TWO)


@pytest.mark.usefixtures("two_workers")
@ONE_AND_TWO_WORKERS
def test_predict_with_steps_matches_keras(source: rk.Source, scale: rk.Scale) -> None:
    model = build()
    expected = model.predict(X[: 2 * BATCH], verbose=0)
    data = tf.data.Dataset.from_tensor_slices(X).batch(BATCH).repeat()
    for x in (source, X, data, (X[i : i + BATCH] for i in range(0, ROWS, BATCH))):
        predicted = rk.predict(model, x, batch_size=BATCH, steps=2, scale=scale)
        np.testing.assert_allclose(predicted, expected, atol=1e-6)
    np.testing.assert_allclose(rk.predict(model, X, batch_size=None), model.predict(X, verbose=0), atol=1e-6)


class Nested(keras.Model):
    """Returns its outputs in dicts, lists and tuples."""

    def call(self, inputs: Any) -> Any:
        return {"a": [inputs, (inputs * 2, inputs * 3)], "b": {"c": inputs[:, None] > 0}}


@pytest.mark.usefixtures("two_workers")
@ONE_AND_TWO_WORKERS
def test_predictions_are_nested_as_in_keras(scale: rk.Scale, tmp_path: Path) -> None:
    expected = Nested().predict(X, verbose=0)
    predicted = rk.predict(Nested, X, scale=scale)
    keras.tree.assert_same_structure(predicted, expected)
    for value, wanted in zip(keras.tree.flatten(predicted), keras.tree.flatten(expected), strict=True):
        np.testing.assert_allclose(value, wanted)
    table = pq.read_table(rk.predict(Nested, X, scale=scale, output=str(tmp_path / "out")))
    assert table.column_names == ["a.output_0", "a.output_1.output_0", "a.output_1.output_1", "b.c"]


def test_evaluate_and_predict_with_checkpoint(source: rk.Source, tmp_path: Path) -> None:
    run = rk.Run(storage=str(tmp_path), name="run")
    result = rk.fit(build, source, batch_size=BATCH, epochs=1, verbose=0, run=run)
    checkpoint = result.checkpoints[-1]
    trained = result.model()
    expected = trained.evaluate(X, Y, sample_weight=W, verbose=0, return_dict=True)
    for model in (checkpoint, checkpoint.path, Path(checkpoint.path) / "model.keras"):
        logs = rk.evaluate(model, source, batch_size=BATCH)
        np.testing.assert_allclose(list(logs.values()), list(expected.values()), rtol=1e-5)
    np.testing.assert_allclose(rk.predict(checkpoint, source), trained.predict(X, verbose=0), atol=1e-5)
    with pytest.raises(rk.CheckpointError, match=r"A checkpoint must be a folder with train_state\.json"):
        rk.evaluate(str(tmp_path / "run"), source)
    with pytest.raises(rk.CheckpointError, match="there is no"):
        rk.evaluate(str(tmp_path / "nothing.keras"), source)


@ONE_AND_TWO_WORKERS  # two replicas are two models, as are two workers
def test_predictions_keep_source_order(source: rk.Source, scale: rk.Scale) -> None:
    model = build()
    predicted = rk.predict(model, source, batch_size=BATCH, scale=scale)
    np.testing.assert_allclose(predicted, model.predict(X, verbose=0), atol=1e-5)
    assert predicted.shape == (ROWS, 1)


def test_named_outputs_are_returned_by_name() -> None:
    model = two_outputs()
    predicted, expected = rk.predict(model, X), model.predict(X, verbose=0)
    assert set(predicted) == {"a", "b"}
    for name, values in expected.items():
        np.testing.assert_allclose(predicted[name], values, atol=1e-5)


@ONE_AND_TWO_WORKERS
def test_parquet_output_contains_source_columns(source: rk.Source, tmp_path: Path, scale: rk.Scale) -> None:
    model, output = two_outputs(), tmp_path / "out"
    assert rk.predict(model, source, scale=scale, output=str(output), columns=["id", "tag"]) == str(output)
    table = pq.read_table(output)
    assert table.column_names == ["a", "b", "id", "tag"]
    assert table["id"].to_pylist() == list(range(ROWS))
    assert table["tag"][102].as_py() == "row 102"
    again = rk.parquet(output, x="a").open()
    assert again.field("a").shape == (3,)
    values = np.stack(table["a"].combine_chunks().to_numpy_ndarray())
    np.testing.assert_allclose(values, model.predict(X, verbose=0)["a"], atol=1e-5)
    with pytest.raises(rk.OptionError, match="must be a new or empty folder"):
        rk.predict(model, source, output=str(output))


def test_output_on_fsspec_storage(source: rk.Source) -> None:
    import fsspec

    rk.predict(build(), source, output="memory://predictions/run")
    with fsspec.open("memory://predictions/run/part-000000.parquet") as file:
        assert pq.read_table(file).column_names == ["prediction"]


def test_failed_prediction_leaves_no_output(tmp_path: Path, source: rk.Source) -> None:
    damaged = sorted((tmp_path / "data").iterdir())[1]
    data = bytearray(damaged.read_bytes())
    data[4:900] = bytes(896)
    damaged.write_bytes(bytes(data))
    with pytest.raises(rk.RaykerasError, match=r"1\.parquet"):
        rk.predict(build(), source, output=str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_module_missing_on_predictors_is_reported(
    source: rk.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from ray._private.state import actors

    (tmp_path / "predicts_here.py").write_text("def build():\n    ...\n\ndef unchanged(columns):\n    return columns\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("predicts_here")
    transformed = rk.parquet(tmp_path / "data", x=NAMES, transform=module.unchanged)
    logging.disable()  # pytest keeps log records, and these keep the models alive
    request.addfinalizer(lambda: logging.disable(logging.NOTSET))
    for model, data in ((module.build, source), (build, transformed)):
        with pytest.raises(rk.UserCodeError, match=r"No module named 'predicts_here'\. Ship the module"):
            rk.predict(model, data, scale=TWO)
        deadline = time.monotonic() + 30
        while any(a["State"] != "DEAD" for a in actors().values() if "RemotePredictor" in a["ActorClassName"]):
            assert time.monotonic() < deadline, "the models of the failed prediction still hold their resources"
            time.sleep(0.1)


def test_invalid_calls_are_refused(source: rk.Source) -> None:
    with pytest.raises(rk.OptionError, match="`columns` are written to `output`"):
        rk.predict(build(), source, columns=["id"])
    with pytest.raises(rk.ColumnError, match=r"got 'idd'\. Did you mean 'id'\?"):
        rk.predict(build(), source, columns=["idd"], output="nowhere")
    with pytest.raises(rk.OptionError, match="`model` must be a compiled model"):
        rk.predict(3, source)


@pytest.mark.parametrize("call", [rk.evaluate, rk.predict])
def test_elastic_scale_is_refused(call: Any) -> None:
    with pytest.raises(rk.OptionError, match=r"`workers` must be one number here.*; got \(1, 2\)"):
        call(build(), X, scale=rk.Scale(workers=(1, 2)))
