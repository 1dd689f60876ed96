"""Differences between training on several workers and replicas and plain `Model.fit`.

    python -m benchmarks.exactness            all cases, as a table
    python -m benchmarks.exactness --workers 2 --keras keras

Each case trains twice over the same batches: with `raykeras.fit`, and with plain `Model.fit` on a single replica in
this process. The table shows the largest relative difference of any value in the history (three epochs; loss, metrics,
weighted metrics, validation) and of any weight.

Cases in float32 may differ by rounding, also with XLA, which orders operations anew. Those in mixed precision must not
differ at all: their rows and weights are small integers, so that no sum over rows is rounded. They train for one epoch,
after which sums would need more bits.
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
    """One combination of workers, replicas, on GPUs or CPUs, Keras package, number of rows and weights."""

    workers: int = 1
    replicas: int = 1
    keras: str = "keras"
    num_rows: int = 8 * BATCH_SIZE
    weighted: bool = False
    precision: str = "float32"
    jit_compile: bool = False
    gpus: bool = False

    @property
    def is_rounded(self) -> bool:
        """Whether sums over rows are rounded."""
        return self.precision == "float32"

    @property
    def batch_size(self) -> int:
        return BATCH_SIZE if self.is_rounded else 8

    @property
    def epochs(self) -> int:
        return EPOCHS if self.is_rounded else 1

    @property
    def history_tolerance(self) -> float:
        return HISTORY_TOLERANCE if self.is_rounded else 0.0

    @property
    def weight_tolerance(self) -> float:
        return WEIGHT_TOLERANCE if self.is_rounded else 0.0

    @property
    def scale(self) -> rk.Scale:
        if self.gpus:
            return rk.Scale(workers=self.workers, gpus_per_worker=self.replicas)
        return rk.Scale(workers=self.workers, replicas_per_worker=self.replicas)

    def __str__(self) -> str:
        weights = "weights" if self.weighted else "no weights"
        compiled = ", XLA" if self.jit_compile else ""
        precision = "" if self.is_rounded else f", {self.precision}"
        return f"{self.workers}x{self.replicas} {self.keras} {self.num_rows} rows, {weights}{precision}{compiled}"


@dataclass(frozen=True)
class Difference:
    """Largest relative differences from plain Keras."""

    history: float
    weights: float

    def is_within(self, case: Case) -> bool:
        return self.history <= case.history_tolerance and self.weights <= case.weight_tolerance


def row_counts(workers: int) -> tuple[int, ...]:
    """Return a multiple of the batch size, one row more, less than one batch, and three batches and workers - 1."""
    return (8 * BATCH_SIZE, 8 * BATCH_SIZE + 1, BATCH_SIZE - 5, 3 * BATCH_SIZE + workers - 1)


def cases() -> Iterator[Case]:
    for (workers, replicas), keras in itertools.product([(1, 1), (1, 2), (2, 1), (3, 1)], ["keras", "tf_keras"]):
        for num_rows, weighted in itertools.product(sorted(set(row_counts(workers))), [False, True]):
            yield Case(workers, replicas, keras, num_rows, weighted)
    for (workers, replicas), keras in itertools.product([(1, 2), (2, 1)], ["keras", "tf_keras"]):
        yield Case(workers, replicas, keras, 257, True, jit_compile=True)
        for precision in ("mixed_bfloat16", "mixed_float16"):
            yield Case(workers, replicas, keras, 17, precision=precision)


def integers(num_rows: int, seed: int) -> pa.Table:
    """Return rows of -1, 0 and 1 with labels of -4, 0 and 4."""
    rng = np.random.default_rng(seed)
    columns = {name: rng.integers(-1, 2, num_rows).astype(np.float32) for name in FEATURES}
    return pa.table({**columns, "label": 4.0 * rng.integers(-1, 2, num_rows).astype(np.float32)})


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


def builder(case: Case) -> Any:
    """Return a function that builds a model with a regulariser, Adam, and unweighted and weighted metrics.

    In mixed precision, it is a linear model with SGD. The gradient of its loss of one row is a multiple of 1/4.
    """
    package = case.keras

    def build() -> Any:
        keras = importlib.import_module(package)
        layers = keras.layers
        if not case.is_rounded:
            linear = layers.Dense(1, use_bias=False, kernel_initializer="zeros", dtype=case.precision)
            output = layers.Activation("linear", dtype="float32")  # so that the loss is in float32
            model = keras.Sequential([keras.Input((len(FEATURES),)), linear, output])
            optimizer: Any = keras.optimizers.SGD(0.5)
            if case.precision == "mixed_float16":
                scaled = keras.optimizers if package == "keras" else keras.mixed_precision
                optimizer = scaled.LossScaleOptimizer(optimizer, initial_scale=2.0**4)  # overflows nowhere
            model.compile(optimizer, "mse", metrics=["mae"])
            return model
        x = keras.Input((len(FEATURES),))
        hidden = layers.Dense(8, activation="relu", kernel_regularizer="l2")(x)
        model = keras.Model(x, layers.Dense(2, activation="softmax")(hidden))
        model.compile(
            keras.optimizers.Adam(0.01),
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            weighted_metrics=["accuracy"],
            jit_compile=case.jit_compile,
        )
        return model

    build.uses = package  # type: ignore[attr-defined]  # so that its pickle names the package
    return build


def arrays_of(table: pa.Table, weighted: bool) -> tuple[np.ndarray, ...]:
    x = np.stack([table[name].to_numpy() for name in FEATURES], 1)
    arrays = (x, table["label"].to_numpy())
    return (*arrays, table["weight"].to_numpy()) if weighted else arrays


def plain_fit(case: Case, train: pa.Table, validation: pa.Table, source: Any, workers: int) -> tuple[Any, list[Any]]:
    """Train with plain `Model.fit` over the planned batches; return the history and the weights."""
    keras = importlib.import_module(case.keras)
    tf = importlib.import_module("tensorflow")
    opened = source.open()
    window_rows = window_rows_for(resolve(source, opened).row_nbytes)
    arrays = arrays_of(train, case.weighted)

    def batches() -> Iterator[tuple[np.ndarray, ...]]:
        for epoch in range(case.epochs):
            plan = PassPlan(
                opened.unit_rows,
                global_batch_size=case.batch_size,
                num_shards=default_num_shards(workers),
                window_rows=window_rows,
                epoch=epoch,
            )
            for step in range(plan.num_steps):
                rows = plan.batch_rows(step)
                yield tuple(array[rows] for array in arrays)

    signature = tuple(tf.TensorSpec((None, *a.shape[1:]), a.dtype) for a in arrays)
    keras.utils.set_random_seed(0)
    model = builder(case)()
    history = model.fit(
        tf.data.Dataset.from_generator(batches, output_signature=signature),
        epochs=case.epochs,
        steps_per_epoch=-(-case.num_rows // case.batch_size),
        validation_data=arrays_of(validation, case.weighted),
        validation_batch_size=case.batch_size,
        shuffle=False,
        verbose=0,
    )
    return history, model.get_weights()


def compare(case: Case, folder: Path) -> Difference:
    """Train a case with raykeras and with plain Keras; return the differences."""
    table = table_of if case.is_rounded else integers
    train, validation = table(case.num_rows, 0), table(case.batch_size + 5, 1)
    source = source_of(train, folder / "train.parquet", case.weighted)
    result = rk.fit(
        builder(case),
        source,
        validation_data=source_of(validation, folder / "validation.parquet", case.weighted),
        batch_size=case.batch_size,
        epochs=case.epochs,
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
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this, such as float16")
    arguments = parser.parse_args()
    tf = importlib.import_module("tensorflow")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    print("| workers × replicas | Keras | rows | weights | precision | history | weights differ |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    failed = 0
    for case in cases():
        if arguments.workers not in (None, case.workers) or arguments.keras not in (None, case.keras):
            continue
        if arguments.only not in str(case):
            continue
        with tempfile.TemporaryDirectory() as folder:
            difference = compare(case, Path(folder))
        failed += not difference.is_within(case)
        precision = case.precision + ", XLA" * case.jit_compile
        print(
            f"| {case.workers} × {case.replicas} | {case.keras} | {case.num_rows} | "
            f"{'yes' if case.weighted else 'no'} | {precision} | {difference.history:.1e} | {difference.weights:.1e} |"
            f"{'' if difference.is_within(case) else ' **too large**'}",
            flush=True,
        )
    raise SystemExit(f"{failed} cases differ by more than allowed" if failed else 0)


if __name__ == "__main__":
    main()
