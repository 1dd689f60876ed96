"""Arrays in memory reach several workers once, through the object store."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

import raykeras as rk
from benchmarks.object_store import taken
from raykeras import specs
from raykeras.cluster import connect
from raykeras.sources.arrays import ArrayReader, from_arrays

X_NBYTES = 400_000_000


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_workers_share_one_copy(dtype: str, tmp_path: Path) -> None:
    found = taken(X_NBYTES, dtype, tmp_path, batch_size=4096, epochs=3)
    x, private = found["x"], found["private"]
    assert isinstance(x, int) and isinstance(private, list)
    assert x == pytest.approx(X_NBYTES, rel=0.01)
    assert found["put"] == pytest.approx(x, rel=0.1)  # not one for each worker, nor for each epoch
    assert found["held"] == pytest.approx(x, rel=0.1)
    assert len(private) == 2
    assert max(private) < x / 2  # of which TensorFlow takes about 120 MB, whatever x


def test_an_array_that_is_not_in_one_piece_is_shared_all_the_same() -> None:
    import ray

    connect(rk.Scale(), in_process=True)
    x = np.arange(2_000_000, dtype=np.float32).reshape(1_000_000, 2)[::2]
    reader = from_arrays(x).open().reader
    assert isinstance(reader, ArrayReader)
    reader.share()
    shared = ray.get(reader.__getstate__()["_ref"])["x"]
    np.testing.assert_array_equal(shared, x)
    assert not shared.flags.owndata and not shared.flags.writeable  # a view of the store


def test_a_weight_found_wrong_while_training_is_named_by_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "_CHECKED_NBYTES", 0)
    weights = np.ones(100)
    weights[37] = np.nan

    def build() -> keras.Model:
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    run = rk.Run(storage=str(tmp_path))
    with pytest.raises(rk.ColumnError, match="'sample_weight' holds nan at row 0 of rows from 37"):
        rk.fit(build, np.ones((100, 2)), np.ones(100), sample_weight=weights, verbose=0, run=run)
