"""A Ray dataset as a source trains like plain `model.fit` on the same rows."""

from __future__ import annotations

import gc
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray

import raykeras as rk
from raykeras.data.plan import PassPlan
from raykeras.data.resolve import resolve
from raykeras.data.sources import ray_dataset
from raykeras.data.sources.ray_dataset import is_ray_dataset
from raykeras.data.streaming.dataset import Stream
from raykeras.data.streaming.interleave import RankInput
from tests.support.compare import assert_same_training
from tests.support.object_store import free_garbage, store_nbytes

ROWS, BATCH = 103, 16
Fit = Callable[..., rk.Result]


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars() -> None:
    ray.data.DataContext.get_current().enable_progress_bars = False


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use row units of a few rows, which cross block boundaries."""
    monkeypatch.setattr(ray_dataset, "_UNIT_NBYTES", 400)


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    def call(model: Any, source: Any, **options: Any) -> rk.Result:
        run = rk.Run(storage=str(tmp_path), name=f"run-{len(list(tmp_path.iterdir()))}")
        return rk.fit(model, source, **{"batch_size": BATCH, "verbose": 0, "run": run, **options})

    return call


def arrays(ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of rows by their ids, as a user's function would."""
    x = np.stack([np.sin(ids * k) for k in range(1, 5)], 1).astype(np.float32)
    return {"id": ids, "x": x, "y": (x[:, 0] > 0).astype(np.int64), "w": (1 + ids % 3).astype(np.float32)}


def rows(num_blocks: int = 5, num_rows: int = ROWS) -> Any:
    return ray.data.range(num_rows, override_num_blocks=num_blocks).map_batches(lambda batch: arrays(batch["id"]))


def source(num_blocks: int = 5, **options: Any) -> Any:
    return rk.dataset(rows(num_blocks), **{"x": "x", "y": "y", "sample_weight": "w", **options})


def build() -> Any:
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, activation="softmax")])
    model.compile(keras.optimizers.Adam(0.05), "sparse_categorical_crossentropy", weighted_metrics=["accuracy"])
    return model


def opened_with(make: Callable[[], Any], **options: Any) -> Any:
    return rk.dataset(make(), **{"x": "v", **options}).open()


def of(**columns: Any) -> Any:
    return ray.data.from_arrow(pa.table(columns))


def made(function: Callable[[Any], Any], **options: Any) -> Any:
    return ray.data.range(20, override_num_blocks=4).map_batches(function, **options)


@pytest.mark.usefixtures("small_units")
def test_fit_evaluate_predict_match_keras(fit: Fit) -> None:
    data = source()
    result = fit(build, data, epochs=2, shuffle=False, validation_split=0.2)
    keras.utils.set_random_seed(0)
    model = build()
    rows = arrays(np.arange(ROWS))
    at = int(ROWS * 0.8)
    x, y, w = rows["x"], rows["y"], rows["w"]
    history = model.fit(
        x[:at], y[:at], sample_weight=w[:at], batch_size=BATCH, epochs=2, shuffle=False, verbose=0,
        validation_data=(x[at:], y[at:], w[at:]),
    )  # fmt: skip
    assert_same_training(result, history.history, model)
    expected = model.evaluate(x, y, sample_weight=w, batch_size=BATCH, verbose=0, return_dict=True)
    assert rk.evaluate(model, data, batch_size=BATCH) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(rk.predict(model, data), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_units", "two_workers")
def test_two_workers_match_one(fit: Fit) -> None:
    data = source()
    one, two = (fit(build, data, epochs=2, validation_split=0.2, scale=rk.Scale(workers=n)) for n in (1, 2))
    for name, values in one.history.items():
        np.testing.assert_allclose(two.history[name], values, rtol=1e-5, err_msg=name)


@pytest.mark.usefixtures("small_units")
def test_units_and_fingerprint_are_independent_of_blocks() -> None:
    few, many = source(num_blocks=2).open(), source(num_blocks=7).open()
    assert len(few.unit_rows) > 7
    np.testing.assert_array_equal(few.unit_rows, many.unit_rows)
    assert few.fingerprint == many.fingerprint
    for opened in (few, many.slice(0, ROWS), many.slice(10, ROWS)):
        units = [opened.reader.read(opened.unit(i), 0, n, ["id"])["id"] for i, n in enumerate(opened.unit_rows)]
        np.testing.assert_array_equal(np.concatenate(units), np.arange(ROWS - opened.num_rows, ROWS))


@pytest.mark.usefixtures("small_units")
def test_shuffled_batches_are_independent_of_num_ranks() -> None:
    data = source(x="id", y=None, sample_weight=None)
    opened = data.open()
    batch_spec = resolve(data, opened)

    def plan(epoch: int) -> PassPlan:
        return PassPlan(opened.unit_rows, global_batch_size=BATCH, window_rows=8, epoch=epoch)

    def batches(rank: int, num_ranks: int) -> list[list[int]]:
        feed = RankInput(opened, batch_spec, plan, rank, num_ranks, local_replicas=1, num_steps=14)
        return [
            batch.tolist() for chunk in Stream(feed)._chunks for batch in np.split(chunk.arrays[0], chunk.cuts[1:-1])
        ]

    one, halves = batches(0, 1), zip(batches(0, 2), batches(1, 2), strict=True)
    assert [sorted(batch) for batch in one] == [sorted(a + b) for a, b in halves]
    assert one == [plan(step // 7).batch_rows(step % 7).tolist() for step in range(14)]
    assert sorted(row for batch in one[:7] for row in batch) == list(range(ROWS))
    assert one[:7] != one[7:]


def test_transform_gets_usable_columns() -> None:
    def doubled(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"z": 2 * columns["v"]}

    def asks(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"z": columns["ragged"]}

    data = of(v=np.arange(3.0), ragged=[[1], [1, 2], []], null=[1, None, 2], unread=pa.array([1, 2, 3], pa.date32()))
    for options in ({}, {"columns": ["v"]}, {"columns": ["v", "ragged"], "pad": {"ragged": 2}}):
        source = rk.dataset(data, x="z", transform=doubled, **options)
        resolve(source, source.open())
    with pytest.raises(rk.ColumnError, match=r"requested column 'ragged' in .* cannot be used: .*have 0 to 2 values"):
        source = rk.dataset(data, x="z", transform=asks)
        resolve(source, source.open())
    with pytest.raises(rk.ColumnError, match=r"column 'null' has 1 in the Ray dataset"):
        rk.dataset(data, x="z", transform=doubled, columns=["v", "null"]).open()


def test_fingerprint_changes_with_data() -> None:
    values = np.arange(20.0)
    prints = {
        opened_with(lambda v=v: of(v=v)).fingerprint for v in (values, values + 1, values[:-1], values.astype("f4"))
    }
    assert len(prints) == 4


def test_dataset_is_executed_once_and_freed() -> None:
    @ray.remote(num_cpus=0)
    class Counter:
        def __init__(self) -> None:
            self.rows = 0

        def add(self, rows: int) -> int:
            self.rows += rows
            return self.rows

    counter = Counter.remote()

    def counted(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ray.get(counter.add.remote(len(batch["id"])))
        return {"x": np.ones((len(batch["id"]), 1_000_000), np.float32)}

    free_garbage()
    before = store_nbytes()
    data = rk.dataset(made(counted), x="x")
    first = data.open()
    assert data.open().reader is first.reader
    assert ray.get(counter.add.remote(0)) == 20
    assert store_nbytes() - before >= 80e6
    del data, first
    gc.collect()
    for _ in range(100):
        if store_nbytes() - before < 10e6:
            return
        time.sleep(0.1)
    raise AssertionError(f"{store_nbytes() - before:,} bytes are still held")


def test_pickled_reader_reads_in_other_process() -> None:
    opened = source().open()

    @ray.remote(num_cpus=0)
    def read(reader: Any, unit: Any) -> list[int]:
        return reader.read(unit, 3, 6, ["id"])["id"].to_pylist()

    assert ray.get(read.remote(opened.reader, opened.unit(0))) == [3, 4, 5]
    unpickled = pickle.loads(ray.cloudpickle.dumps(opened.reader))
    assert unpickled.read(opened.unit(0), 3, 6, ["id"])["id"].to_pylist() == [3, 4, 5]


TENSORS = np.arange(24, dtype=np.float32).reshape(6, 2, 2)


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (lambda: ray.data.from_numpy(TENSORS).rename_columns({"data": "v"}), {}, TENSORS),
        (lambda: of(v=pa.FixedShapeTensorArray.from_numpy_ndarray(TENSORS)), {}, TENSORS),
        (lambda: ray.data.from_numpy(TENSORS > 3).rename_columns({"data": "v"}), {}, TENSORS > 3),
        (lambda: ray.data.from_pandas(pd.DataFrame({"v": [1, 2, 3]})), {}, np.array([1, 2, 3])),
        (lambda: of(v=[1.0, None, 2.0]), {"fill": {"v": -1}}, np.array([1, -1, 2], np.float32)),
        (lambda: of(v=[[1, 2], [3, 4]]), {}, np.array([[1, 2], [3, 4]])),
        (lambda: of(v=[[1, 2], []]), {"pad": {"v": 3}}, np.array([[1, 2, 0], [0, 0, 0]])),
    ],
    ids=["tensors", "arrow's tensors", "booleans", "pandas", "nulls", "lists", "padded"],
)  # fmt: skip
def test_supported_types_become_tensors(make: Any, options: Any, expected: np.ndarray) -> None:
    data = rk.dataset(make(), x="v", **options)
    opened = data.open()
    batch_spec = resolve(data, opened)
    (values,) = batch_spec.assemble(batch_spec.decode(opened.head(10, batch_spec.columns), ""), "")
    np.testing.assert_array_equal(values, expected)


def test_types_are_unified_across_blocks() -> None:
    def words(batch: Any) -> Any:
        ids = batch["id"]
        return {
            "text": ids.astype(str),
            "v": [list(range(i // 5)) for i in ids],
            "u": [np.ones(i // 5 + 1) for i in ids],
        }

    opened = rk.dataset(made(words), x="text").open()
    assert opened.field("text").kind == "string"
    assert (opened.field("v").kind, opened.field("v").dtype) == ("list", "int64")
    assert (opened.field("u").kind, opened.field("u").dtype) == ("list", "float64")
    head = opened.head(20, ["text", "v", "u"])
    assert head["text"].to_pylist() == [str(i) for i in range(20)]
    assert [len(v) for v in head["v"].to_pylist()] == [i // 5 for i in range(20)]
    assert [len(v) for v in head["u"].to_pylist()] == [i // 5 + 1 for i in range(20)]


def test_empty_blocks_are_skipped() -> None:
    opened = rk.dataset(made(lambda b: {"id": b["id"][b["id"] > 12]}), x="id").open()
    assert opened.head(9, ["id"])["id"].to_pylist() == list(range(13, 20))
    with pytest.raises(rk.SourceError, match="must have at least one row; this dataset has none"):
        rk.dataset(made(lambda b: {"id": b["id"][:0]}), x="id").open()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of(v=[1.0, None, 2.0]), r"not contain nulls; column 'v' has 1 in the Ray dataset. Pass `fill="),
        (lambda: of(v=[[1, 2], []]), "lists of column 'v' have 0 to 2 values. Pass `pad="),
        (lambda: made(lambda b: {"v": [np.ones((i % 3 + 1, 2)) for i in b["id"]]}), "tensors of different shapes"),
        (
            lambda: made(lambda b: {"v": b["id"].astype(np.float32 if b["id"][0] else np.int64)}),
            "the same type in all rows; 'v' is int64 in some and float in others",
        ),
    ],
    ids=["nulls", "lists", "shapes", "types"],
)  # fmt: skip
def test_unusable_columns_are_refused_before_start(make: Any, message: str) -> None:
    with pytest.raises(rk.ColumnError, match=message):
        opened_with(make)


def test_unused_column_of_two_types_is_ignored() -> None:
    def make() -> Any:
        return made(lambda b: {"v": b["id"], "other": b["id"].astype(np.float32 if b["id"][0] else np.int64)})

    def fields(**options: Any) -> set[str]:
        source = rk.dataset(make(), x="v", **options)
        return set(resolve(source, source.open()).columns)

    assert fields() == {"v"}
    assert fields(transform=lambda columns: {"v": columns["v"] * 2}) == {"v"}
    for options in ({"y": "other"}, {"transform": lambda columns: {"v": columns["other"]}}):
        with pytest.raises(rk.ColumnError, match="'other' is int64 in some and float in others"):
            fields(**options)


def failing(row: dict[str, Any]) -> dict[str, Any]:
    return {"v": 1 / (row["id"] - 7)}


def test_user_exception_keeps_user_traceback() -> None:
    data = ray.data.range(20, override_num_blocks=2).map(failing)
    with pytest.raises(rk.UserCodeError, match="function of the dataset raised ZeroDivisionError") as caught:
        rk.dataset(data, x="v").open()
    assert caught.value.cause == "ZeroDivisionError"
    assert "in failing" in caught.value.user_traceback
    assert "site-packages" not in caught.value.user_traceback


def test_unwrapped_dataset_is_refused() -> None:
    data = ray.data.range(4)
    assert is_ray_dataset(data) and is_ray_dataset(data.materialize())
    with pytest.raises(rk.OptionError, match=r"got a Dataset as `x`. Wrap it: `rk.dataset\(ds, x=..., y=...\)`"):
        rk.fit(build, data)
    with pytest.raises(rk.OptionError, match="got a MaterializedDataset as `validation_data`"):
        rk.fit(build, np.ones((4, 4)), np.ones(4), validation_data=data.materialize())
    with pytest.raises(rk.OptionError, match=r"takes a ray.data.Dataset; got ndarray"):
        rk.dataset(np.ones(3), x="x")
