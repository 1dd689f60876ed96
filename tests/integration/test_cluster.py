"""Data tasks use the CPUs that other work on the cluster leaves free."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest

import raykeras as rk
from raykeras.data.streaming import resources
from raykeras.data.streaming.resources import plan_budget
from tests.support.cpus import all_held_but, free_cpus
from tests.support.models import TWO

BATCH = 16
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(240, 4)).astype(np.float32), RNG.integers(0, 3, 240)
NAMES = ["a", "b", "c", "d"]


def build() -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax")])
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@pytest.mark.parametrize(("made", "scale"), [("rows", TWO), ("batches", rk.Scale())], ids=["rows", "batches"])
def test_streams_share_remaining_cpu_fraction(tmp_path: Path, made: str, scale: rk.Scale, two_workers: None) -> None:
    """Otherwise a second stream would request a whole CPU and never be scheduled."""

    class Sequence(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Any:
            return X[index * BATCH : (index + 1) * BATCH], Y[index * BATCH : (index + 1) * BATCH]

    pd.DataFrame(X, columns=NAMES).assign(y=Y).to_parquet(tmp_path / "rows.parquet", row_group_size=10)
    data: Any = rk.parquet(tmp_path / "rows.parquet", x=NAMES, y="y")
    plain: tuple[Any, ...] = (X, Y)
    options: dict[str, Any] = {"batch_size": BATCH, "validation_split": 0.2}
    if made == "batches":
        data, plain, options = Sequence(), (Sequence(),), {"validation_data": Sequence()}
    with all_held_but(0.98):
        run = rk.Run(storage=str(tmp_path / "runs"))
        result = rk.fit(build, data, **options, epochs=2, shuffle=False, scale=scale, run=run, verbose=0)
    expected = build().fit(*plain, **options, epochs=2, shuffle=False, verbose=0)
    for name, values in expected.history.items():
        np.testing.assert_allclose(result.history[name], values, rtol=1e-5, err_msg=name)


def test_waits_for_cpus_held_by_other_tasks(tmp_path: Path) -> None:
    import ray

    while (num_free := free_cpus()) < 1:  # earlier tests' tasks are still ending
        pass
    end = tmp_path / "end"

    @ray.remote(num_cpus=num_free)
    def hold() -> None:
        while not end.exists():
            time.sleep(0.1)

    holding = hold.remote()
    while ray.available_resources().get("CPU", 0) > 0.001:
        time.sleep(0.01)
    threading.Timer(1.0, end.touch).start()
    assert plan_budget(0.0, 0).cpus_per_task == 1
    ray.get(holding)


def test_tasks_take_minimal_cpu_when_none_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """With other tasks running back to back, a whole CPU would never be free."""
    monkeypatch.setattr(resources, "_BUSY_S", 0.5)
    with all_held_but(0.0):
        assert plan_budget(0.0, 0).cpus_per_task == 0.01
