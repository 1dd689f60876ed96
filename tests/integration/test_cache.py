"""`cache="memory"` yields the same batches as streaming, and reads storage once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import tensorflow as tf

import raykeras as rk
from raykeras.data.plan import PassPlan
from raykeras.data.resolve import resolve
from raykeras.data.sources.base import Source
from raykeras.data.streaming.cache import CachedRows
from raykeras.data.streaming.dataset import Stream
from raykeras.data.streaming.interleave import RankInput
from tests.support.models import TWO

ROWS, BATCH = 103, 16
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
W = RNG.uniform(0.2, 2, ROWS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with two files with row groups of ten rows."""
    lengths = np.arange(ROWS) % 4
    made = {
        **{f"f{i}": X[:, i] for i in range(4)},
        "y": Y,
        "w": W,
        "text": pa.array([f"row {i}" for i in range(ROWS)]),
        "list": pa.array([list(range(n)) for n in lengths], pa.list_(pa.float32())),
    }
    table, folder = pa.table(made), tmp_path / "data"
    for i, part in enumerate((table.slice(0, 60), table.slice(60))):
        (folder / f"part={i}").mkdir(parents=True)
        pq.write_table(part, folder / f"part={i}" / "rows.parquet", row_group_size=10)
    return folder


FEATURES = ["f0", "f1", "f2", "f3"]


def augment(columns: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {**columns, "f0": columns["f0"] + rng.normal(size=len(columns["f0"])).astype(np.float32)}


SPECS: dict[str, dict[str, Any]] = {
    "stacked": {"x": FEATURES, "y": "y", "sample_weight": "w"},
    "text": {"x": {"a": "text", "b": "f1"}, "y": {"c": "y", "d": "f2"}},
    "ragged": {"x": "list", "y": "y", "ragged": ["list"]},
    "padded": {"x": {"a": "list", "b": "part"}, "y": "y", "pad": {"list": 2}},
    "transformed": {"x": FEATURES, "y": "y", "transform": augment, "pad": {"list": 3}},
}


def batches(source: Source, cached: bool, rank: int, num_ranks: int, first_step: int, **options: Any) -> list[Any]:
    """Return a rank's flattened batches of three passes from a step on; ragged ones as values and row splits."""
    rows = source.open().slice(5, ROWS)
    rows_layout = resolve(source, rows, **options)
    opened, batch_spec = CachedRows(rows, rows_layout).source(rows_layout) if cached else (rows, rows_layout)

    def plan(epoch: int) -> PassPlan:
        return PassPlan(rows.unit_rows, global_batch_size=BATCH, window_rows=16, seed=1, epoch=epoch)

    steps = 3 * plan(0).num_steps
    stream = Stream(RankInput(opened, batch_spec, plan, rank, num_ranks, 1, num_steps=steps, first_step=first_step))
    flat = []
    for batch in stream.endless_dataset().take(steps - first_step):
        flat.append([part.numpy() for part in tf.nest.flatten(batch, expand_composites=True)])
    assert len(flat) == steps - first_step
    return flat


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("rank", "num_ranks", "first_step"), [(0, 1, 0), (1, 3, 9)])
def test_cached_batches_equal_streamed_ones(
    folder: Path, spec: dict[str, Any], rank: int, num_ranks: int, first_step: int
) -> None:
    weights = {} if spec["x"] != FEATURES else {"class_weight": {0: 0.5, 1: 3.0}}
    source = rk.parquet(folder, **spec)
    streamed, cached = (batches(source, cached, rank, num_ranks, first_step, **weights) for cached in (False, True))
    for batch, expected in zip(cached, streamed, strict=True):
        for array, expected_array in zip(batch, expected, strict=True):
            np.testing.assert_array_equal(array, expected_array)
            assert array.dtype == expected_array.dtype


def test_cached_text_is_shared_with_workers(folder: Path) -> None:
    source = rk.parquet(folder, **SPECS["text"])
    opened = source.open()
    held, batch_spec = CachedRows(opened, resolve(source, opened)).source(resolve(source, opened))
    expected, name = held.reader.read(held.unit(3), 2, 5, batch_spec.columns), batch_spec.columns[0]
    held.reader.share()  # type: ignore[attr-defined]
    shared = ray.get(ray.put(held.reader)).read(held.unit(3), 2, 5, batch_spec.columns)[name]
    assert shared.to_pylist() == expected[name].to_pylist() == [b"row 32", b"row 33", b"row 34"]


def test_npy_files_are_cached(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    source = rk.npy(tmp_path / "x.npy", str(tmp_path / "y.npy"))
    for batch, expected in zip(*(batches(source, cached, 0, 1, 0) for cached in (True, False)), strict=True):
        for array, expected_array in zip(batch, expected, strict=True):
            np.testing.assert_array_equal(array, expected_array)


def build() -> Any:
    inputs = keras.Input((4,), name="x")
    model = keras.Model(inputs, keras.layers.Dense(2, "softmax")(inputs))
    model.compile(keras.optimizers.Adam(0.05), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class Removes(keras.callbacks.Callback):  # type: ignore[misc]
    """Deletes the data after the first epoch."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = str(folder)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        for part in (0, 1):
            Path(f"{self.folder}/part={part}/rows.parquet").unlink(missing_ok=True)  # on both workers


@pytest.mark.parametrize("scale", [rk.Scale(), TWO], ids=["1 worker", "2 workers"])
def test_no_file_is_read_after_first_epoch(folder: Path, scale: rk.Scale, tmp_path: Path, two_workers: None) -> None:
    histories = []
    for cache, callbacks in ((None, []), ("memory", [Removes(folder)])):
        source = rk.parquet(folder, x=FEATURES, y="y", sample_weight="w", cache=cache)  # type: ignore[arg-type]
        result = rk.fit(
            build,
            source,
            batch_size=BATCH,
            epochs=3,
            validation_split=0.2,
            callbacks=callbacks,
            scale=scale,
            run=rk.Run(storage=str(tmp_path / "runs"), name=str(cache)),
            verbose=0,
        )
        histories.append((result.history, result.model().get_weights()))
    assert not list(folder.glob("*/*.parquet"))
    assert histories[0][0] == histories[1][0]
    for cached, streamed in zip(histories[1][1], histories[0][1], strict=True):
        np.testing.assert_array_equal(cached, streamed)


def test_run_resumes_with_other_cache_setting(folder: Path, tmp_path: Path) -> None:
    def fit(name: str, epochs: int, cache: Any) -> rk.Result:
        source = rk.parquet(folder, x=FEATURES, y="y", cache=cache)
        run = rk.Run(storage=str(tmp_path / "runs"), name=name)
        return rk.fit(build, source, batch_size=BATCH, epochs=epochs, run=run, verbose=0)

    fit("resumed", 1, None)
    resumed, straight = fit("resumed", 3, "memory"), fit("straight", 3, None)
    assert resumed.history == straight.history


def test_evaluate_of_cached_rows_matches_keras(folder: Path) -> None:
    model = build()
    expected = model.evaluate(X, Y, batch_size=BATCH, verbose=0, return_dict=True)
    source = rk.parquet(folder, x=FEATURES, y="y", cache="memory")
    assert rk.evaluate(model, source, batch_size=BATCH) == pytest.approx(expected, rel=1e-5)


def test_unreadable_row_group_is_named(folder: Path, tmp_path: Path) -> None:
    source = rk.parquet(folder, x=FEATURES, y="y", cache="memory")
    path = folder / "part=1" / "rows.parquet"
    content = bytearray(path.read_bytes())
    content[40:200] = b"\xff" * 160
    path.write_bytes(content)
    with pytest.raises(rk.SourceError, match=r"file .*part=1/rows.parquet, row group 0 is not"):
        rk.fit(build, source, batch_size=BATCH, run=rk.Run(storage=str(tmp_path / "runs")), verbose=0)
