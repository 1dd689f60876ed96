"""Several workers share one copy of in-memory arrays in the object store."""

from __future__ import annotations

import pickle
from pathlib import Path

import keras
import numpy as np
import pytest

import raykeras as rk
from benchmarks.object_store import measure
from raykeras.data import resolve
from raykeras.data.sources.arrays import ArrayReader, from_arrays
from tests.support.object_store import free_garbage

X_NBYTES = 400_000_000


@pytest.mark.usefixtures("two_workers")
def test_two_workers_share_one_copy(tmp_path: Path) -> None:
    """An array of float64, which each worker converts to float32 batch by batch."""
    free_garbage()
    measured = measure(X_NBYTES, "float64", tmp_path, batch_size=4096, epochs=3)
    assert measured["x"] == pytest.approx(X_NBYTES, rel=0.01)
    assert measured["put"] == pytest.approx(X_NBYTES, rel=0.1)  # once, not per worker or per epoch
    assert measured["held"] == pytest.approx(X_NBYTES, rel=0.1)
    assert len(measured["private"]) == 2
    assert max(measured["private"]) < X_NBYTES / 2  # TensorFlow takes about 120 MB of it, regardless of the array


def test_shared_arrays_pickle_as_reference() -> None:
    reader = ArrayReader({"x": np.arange(1_000_000)})
    reader.share()
    assert len(pickle.dumps({"state": reader.__getstate__()["_arrays"]})) < 1000
    copy = ArrayReader.__new__(ArrayReader)
    copy.__dict__.update(reader.__getstate__())
    np.testing.assert_array_equal(copy.arrays["x"], np.arange(1_000_000))


def test_non_contiguous_array_is_shared() -> None:
    import ray

    x = np.arange(2_000_000, dtype=np.float32).reshape(1_000_000, 2)[::2]
    reader = from_arrays(x).open().reader
    assert isinstance(reader, ArrayReader)
    reader.share()
    shared = ray.get(reader.__getstate__()["_ref"])["x"]
    np.testing.assert_array_equal(shared, x)
    assert not shared.flags.owndata and not shared.flags.writeable  # a view of the store


def test_non_finite_weight_is_named_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "_CHECKED_NBYTES", 0)
    weights = np.ones(100)
    weights[37] = np.nan

    def build() -> keras.Model:
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    run = rk.Run(storage=str(tmp_path))
    with pytest.raises(rk.ColumnError, match="'sample_weight' holds nan at row 37"):
        rk.fit(build, np.ones((100, 2)), np.ones(100), sample_weight=weights, verbose=0, run=run)
