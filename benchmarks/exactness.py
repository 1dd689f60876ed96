"""Differences between training on several workers and replicas and plain `Model.fit`.

    python -m benchmarks.exactness            all cases, as a table
    python -m benchmarks.exactness --workers 2 --keras keras

Each case trains twice over the same batches: with `raykeras.fit`, and with plain `Model.fit` on a single replica in
this process. The table shows the largest relative difference of any value in the history (three epochs; loss, metrics,
weighted metrics, validation) and of any weight.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import raykeras as rk
from raykeras.data.plan import PassPlan, default_num_shards, window_rows_for
from raykeras.data.resolve import resolve

BATCH_SIZE = 32
EPOCHS = 3
FEATURES = [f"f{i}" for i in range(6)]
HISTORY_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4


@dataclass(frozen=True)
class Case:
    """One combination of workers, replicas, Keras package, number of rows and weights."""

    workers: int = 1
    replicas: int = 1
    keras: str = "keras"
    num_rows: int = 8 * BATCH_SIZE
    weighted: bool = False

    @property
    def scale(self) -> rk.Scale:
        return rk.Scale(workers=self.workers, replicas_per_worker=self.replicas)

    def __str__(self) -> str:
        weights = "weights" if self.weighted else "no weights"
        return f"{self.workers}x{self.replicas} {self.keras} {self.num_rows} rows, {weights}"


@dataclass(frozen=True)
class Difference:
    """Largest relative differences from plain Keras."""

    history: float
    weights: float

    @property
    def within(self) -> bool:
        return self.history <= HISTORY_TOLERANCE and self.weights <= WEIGHT_TOLERANCE


def row_counts(workers: int) -> tuple[int, ...]:
    """Return a multiple of the batch size, one row more, less than one batch, and three batches and workers - 1."""
    return (8 * BATCH_SIZE, 8 * BATCH_SIZE + 1, BATCH_SIZE - 5, 3 * BATCH_SIZE + workers - 1)


def cases() -> Iterator[Case]:
    for (workers, replicas), keras in itertools.product([(1, 1), (1, 2), (2, 1), (3, 1)], ["keras", "tf_keras"]):
        for num_rows, weighted in itertools.product(sorted(set(row_counts(workers))), [False, True]):
            yield Case(workers, replicas, keras, num_rows, weighted)


def table_of(num_rows: int, seed: int) -> pa.Table:
    """Return rows that a small model can learn from."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, len(FEATURES))).astype(np.float32)
    columns: dict[str, Any] = {name: x[:, i] for i, name in enumerate(FEATURES)}
    columns["label"] = (x[:, 0] + 0.3 * rng.normal(size=num_rows) > 0).astype(np.int64)
    columns["weight"] = rng.uniform(0.2, 1.2, num_rows).astype(np.float32)
    return pa.table(columns)


def source_of(table: pa.Table, path: Path, weighted: bool) -> rk.Source:
    """Write a table to a Parquet file with small row groups, and return the source."""
    pq.write_table(table, path, row_group_size=10)
    return rk.parquet(path, x=FEATURES, y="label", sample_weight="weight" if weighted else None)


def builder(package: str) -> Any:
    """Return a function that builds a model with a regulariser, Adam, and unweighted and weighted metrics."""

    def build() -> Any:
        keras = importlib.import_module(package)
        layers = keras.layers
        x = keras.Input((len(FEATURES),))
        hidden = layers.Dense(8, activation="relu", kernel_regularizer="l2")(x)
        model = keras.Model(x, layers.Dense(2, activation="softmax")(hidden))
        model.compile(
            keras.optimizers.Adam(0.01),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            weighted_metrics=["accuracy"],
        )
        return model

    build.uses = package  # type: ignore[attr-defined]  # so that its pickle names the package
    return build


def arrays_of(table: pa.Table, weighted: bool) -> tuple[np.ndarray, ...]:
    x = np.stack([table[name].to_numpy() for name in FEATURES], 1)
    arrays = (x, table["label"].to_numpy(), table["weight"].to_numpy())
    return arrays if weighted else arrays[:2]


def plain_fit(case: Case, train: pa.Table, validation: pa.Table, source: Any, workers: int) -> tuple[Any, list[Any]]:
    """Train with plain `Model.fit` over the planned batches; return the history and the weights."""
    keras = importlib.import_module(case.keras)
    tf = importlib.import_module("tensorflow")
    opened = source.open()
    window_rows = window_rows_for(resolve(source, opened).row_nbytes)
    arrays = arrays_of(train, case.weighted)

    def batches() -> Iterator[tuple[np.ndarray, ...]]:
        for epoch in range(EPOCHS):
            plan = PassPlan(
                opened.unit_rows,
                global_batch_size=BATCH_SIZE,
                num_shards=default_num_shards(workers),
                window_rows=window_rows,
                epoch=epoch,
            )
            for step in range(plan.num_steps):
                rows = plan.batch_rows(step)
                yield tuple(array[rows] for array in arrays)

    signature = tuple(tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in arrays)
    keras.utils.set_random_seed(0)
    model = builder(case.keras)()
    history = model.fit(
        tf.data.Dataset.from_generator(batches, output_signature=signature),
        epochs=EPOCHS,
        steps_per_epoch=-(-case.num_rows // BATCH_SIZE),
        validation_data=arrays_of(validation, case.weighted),
        validation_batch_size=BATCH_SIZE,
        shuffle=False,
        verbose=0,
    )
    return history, model.get_weights()


def compare(case: Case, folder: Path) -> Difference:
    """Train a case with raykeras and with plain Keras; return the differences."""
    train, validation = table_of(case.num_rows, 0), table_of(BATCH_SIZE + 5, 1)
    source = source_of(train, folder / "train.parquet", case.weighted)
    result = rk.fit(
        builder(case.keras),
        source,
        validation_data=source_of(validation, folder / "validation.parquet", case.weighted),
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        verbose=0,
        scale=case.scale,
        run=rk.Run(storage=str(folder), name="run"),
    )
    history, weights = plain_fit(case, train, validation, source, case.workers)
    assert set(history.history) == set(result.history)
    return Difference(
        max(relative(history.history[name], result.history[name]) for name in history.history),
        max(relative(a, b) for a, b in zip(weights, result.model().get_weights(), strict=True)),
    )


def relative(expected: Any, actual: Any) -> float:
    """Return the largest difference, relative to the largest value."""
    expected, actual = np.asarray(expected, float), np.asarray(actual, float)
    return float(np.max(np.abs(expected - actual)) / max(np.max(np.abs(expected)), 1e-12))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--keras", choices=["keras", "tf_keras"])
    arguments = parser.parse_args()
    tf = importlib.import_module("tensorflow")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    print("| workers × replicas | Keras | rows | weights | history | weights differ |")
    print("| --- | --- | --- | --- | --- | --- |")
    failed = 0
    for case in cases():
        if arguments.workers not in (None, case.workers) or arguments.keras not in (None, case.keras):
            continue
        with tempfile.TemporaryDirectory() as folder:
            difference = compare(case, Path(folder))
        failed += not difference.within
        print(
            f"| {case.workers} × {case.replicas} | {case.keras} | {case.num_rows} | "
            f"{'yes' if case.weighted else 'no'} | {difference.history:.1e} | {difference.weights:.1e} |"
            f"{'' if difference.within else ' **too large**'}",
            flush=True,
        )
    raise SystemExit(f"{failed} cases differ by more than allowed" if failed else 0)


if __name__ == "__main__":
    main()
