"""The Keras guide "Training & evaluation with the built-in methods", section by section.

Each example trains on the same batches in plain Keras and through raykeras, on one worker and on two, and the results
are compared. Classes and functions are defined as in the guide, without registration. The guide's callbacks are in
`test_callbacks.py`. Unless pytest is run with `--exhaustive`, examples that differ only in data or weights train with
Keras 3 on two workers only, and tf_keras trains on two replicas of one worker.
https://keras.io/guides/training_with_built_in_methods
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

import raykeras as rk
from tests.support.compare import assert_same_training
from tests.support.models import BATCH, CLASS, IMAGES, PACKAGES, ROWS, SCORE, SERIES, TWO, WEIGHT, X, Y, two_inputs

ONE_HOT = np.eye(3, dtype=np.float32)[Y]
VALIDATION = (X[:29] + 0.1, Y[:29])
ONE = rk.Scale()

pytestmark = [pytest.mark.usefixtures("two_workers"), pytest.mark.tf_keras_on_replicas]
KERAS_3 = pytest.mark.parametrize("package", ["keras"])
TF_KERAS = pytest.mark.parametrize("package", ["tf_keras"])
KERAS_3_BY_DEFAULT = pytest.mark.parametrize(
    "package", ["keras", pytest.param("tf_keras", marks=pytest.mark.exhaustive)]
)
FEWER_SCALES = pytest.mark.fewer_scales  # see above

Make = Callable[[], Any]
Models = Mapping[rk.Scale, Any]


def uncompiled(keras: Any, *, logits: bool = False, between: Any = None) -> Any:
    """Return a small version of the guide's first model, with an optional layer between its two layers."""
    inputs = keras.Input((8,), name="digits")
    hidden = keras.layers.Dense(6, activation="relu", name="dense_1")(inputs)
    hidden = hidden if between is None else between(hidden)
    outputs = keras.layers.Dense(3, activation=None if logits else "softmax", name="predictions")(hidden)
    return keras.Model(inputs, outputs)


def compiled(keras: Any, **options: Any) -> Make:
    def make() -> Any:
        model = uncompiled(keras)
        values = {name: value(keras) if callable(value) else value for name, value in options.items()}
        metrics = ["sparse_categorical_accuracy"]
        model.compile(
            **{"optimizer": "rmsprop", "loss": "sparse_categorical_crossentropy", "metrics": metrics, **values}
        )
        return model

    return make


def seeded(keras: Any, make: Make) -> Any:
    keras.backend.clear_session()  # resets the counters in layer names
    keras.utils.set_random_seed(0)
    return make()


def created(value: Any) -> Any:
    """Call functions that create data which can be used once."""
    return value() if inspect.isfunction(value) else value


class Example:
    """Trains an example of the guide in plain Keras, and through raykeras at each scale.

    Args:
        package: "keras" or "tf_keras".
        folder: Folder for runs.
        scales: Scales to train at.
    """

    def __init__(self, package: str, folder: Path, scales: Sequence[rk.Scale]) -> None:
        self.keras = importlib.import_module(package)
        self.package, self.folder, self.scales = package, folder, scales

    def models(self, make: Make) -> tuple[Models, Any]:
        """Return equal models: one for each scale, and one for plain Keras."""
        return {scale: seeded(self.keras, make) for scale in self.scales}, seeded(self.keras, make)

    def fit(
        self,
        models: Models,
        oracle: Any,
        *data: Any,
        plain_data: tuple[Any, ...] = (),
        plain_options: Mapping[str, Any] | None = None,
        not_on_several: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        """Fit all models, and assert that they end with the oracle's history and weights.

        Args:
            models: Model by scale.
            oracle: Model for plain Keras.
            data: Positional arguments of `fit`; functions create them for each fit.
            plain_data: The oracle's data, if plain Keras takes another form of it.
            plain_options: Options that differ for the oracle.
            not_on_several: Metrics that differ on several replicas.
            options: Options of `fit`.
        """
        options = {"epochs": 2, "shuffle": False, "verbose": 0, **options}
        if not hasattr(data[0], "element_spec") and "batch_size" not in options and not plain_data:
            options["batch_size"] = BATCH
        expected = oracle.fit(*map(created, plain_data or data), **{**options, **(plain_options or {})}).history
        for scale, model in models.items():
            run = rk.Run(storage=str(self.folder))
            result = rk.fit(model, *map(created, data), **options, scale=scale, run=run)
            ignored = not_on_several if scale.total_replicas > 1 else ()
            assert_same_training(result, expected, oracle, ignored=ignored, message=str(scale))

    def trains(self, make: Make, *data: Any, **options: Any) -> tuple[Models, Any]:
        models, oracle = self.models(make)
        self.fit(models, oracle, *data, **options)
        return models, oracle


@pytest.fixture
def example(package: str, tmp_path: Path, request: pytest.FixtureRequest, several: rk.Scale) -> Example:
    is_fewer = request.node.get_closest_marker("fewer_scales") and not request.config.getoption("--exhaustive")
    return Example(package, tmp_path, (several,) if is_fewer or several != TWO else (ONE, several))


# API overview: a first end-to-end example


@PACKAGES
def test_first_end_to_end_example(example: Example) -> None:
    make = compiled(
        example.keras,
        optimizer=lambda k: k.optimizers.RMSprop(),
        loss=lambda k: k.losses.SparseCategoricalCrossentropy(),
        metrics=lambda k: [k.metrics.SparseCategoricalAccuracy()],
    )
    models, oracle = example.trains(make, X, Y, validation_data=VALIDATION)
    expected = oracle.evaluate(*VALIDATION, batch_size=8, verbose=0)
    for scale, model in models.items():
        values = rk.evaluate(model, *VALIDATION, batch_size=8, scale=scale, return_dict=False)
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        predictions = rk.predict(model, X[:3], scale=scale)
        assert predictions.shape == (3, 3)
        np.testing.assert_allclose(predictions, oracle.predict(X[:3], verbose=0), atol=1e-5)


# The compile() method: specifying a loss, metrics, and an optimizer


@PACKAGES
def test_built_in_optimizers_losses_and_metrics(example: Example) -> None:
    make = compiled(
        example.keras,
        optimizer=lambda k: k.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
        loss=lambda k: k.losses.KLDivergence(),
        metrics=lambda k: [k.metrics.AUC(name="auc"), k.metrics.Precision(name="p"), k.metrics.Recall(name="r"), "mae"],
        weighted_metrics=lambda k: [k.metrics.AUC(name="weighted_auc")],
    )
    models, oracle = example.trains(make, X, ONE_HOT, sample_weight=WEIGHT)
    expected = oracle.evaluate(X, ONE_HOT, sample_weight=WEIGHT, batch_size=BATCH, verbose=0, return_dict=True)
    for scale, model in models.items():
        logs = rk.evaluate(model, X, ONE_HOT, sample_weight=WEIGHT, batch_size=BATCH, scale=scale)
        assert logs == pytest.approx(expected, rel=1e-5)


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
@pytest.mark.parametrize("returns", ["rows", "a scalar"])  # as in the guide for Keras 3, and in that of TensorFlow
def test_custom_loss_function(example: Example, returns: str) -> None:
    def custom_mean_squared_error(y_true: Any, y_pred: Any) -> Any:
        return tf.reduce_mean(tf.square(y_true - y_pred), axis=-1 if returns == "rows" else None)

    def make() -> Any:
        model = uncompiled(example.keras)
        model.compile(optimizer=example.keras.optimizers.Adam(), loss=custom_mean_squared_error)
        return model

    example.trains(make, X, ONE_HOT)


@PACKAGES
@pytest.mark.parametrize("returns", ["rows", "a scalar"])
def test_custom_loss_class_with_parameters(example: Example, returns: str) -> None:
    axis = -1 if returns == "rows" else None

    class CustomMSE(example.keras.losses.Loss):  # type: ignore[name-defined, misc]
        def __init__(self, regularization_factor: float = 0.1, name: str = "custom_mse") -> None:
            super().__init__(name=name)
            self.regularization_factor = regularization_factor

        def call(self, y_true: Any, y_pred: Any) -> Any:
            mse = tf.reduce_mean(tf.square(y_true - y_pred), axis=axis)
            return mse + tf.reduce_mean(tf.square(0.5 - y_pred), axis=axis) * self.regularization_factor

    def make() -> Any:
        model = uncompiled(example.keras)
        model.compile(optimizer=example.keras.optimizers.Adam(), loss=CustomMSE(0.3))
        return model

    example.trains(make, X, ONE_HOT)


@PACKAGES
def test_custom_metric_with_state(example: Example) -> None:
    class CategoricalTruePositives(example.keras.metrics.Metric):  # type: ignore[name-defined, misc]
        def __init__(self, name: str = "categorical_true_positives", **kwargs: Any) -> None:
            super().__init__(name=name, **kwargs)
            self.true_positives = self.add_weight(name="ctp", shape=(), initializer="zeros")

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            labels = tf.cast(tf.reshape(tf.argmax(y_pred, axis=1), (-1, 1)), tf.int32)
            values = tf.cast(tf.cast(tf.reshape(y_true, (-1, 1)), tf.int32) == labels, tf.float32)
            self.true_positives.assign_add(tf.reduce_sum(values))

        def result(self) -> Any:
            return self.true_positives if example.package == "keras" else tf.identity(self.true_positives)

        def reset_state(self) -> None:
            self.true_positives.assign(0.0)

    make = compiled(example.keras, metrics=lambda k: [CategoricalTruePositives()])
    example.trains(make, X, Y, epochs=3, validation_data=VALIDATION)


@PACKAGES
def test_add_loss_in_a_layer(example: Example) -> None:
    class ActivityRegularizationLayer(example.keras.layers.Layer):  # type: ignore[name-defined, misc]
        def call(self, inputs: Any) -> Any:
            self.add_loss(tf.reduce_sum(inputs) * 0.1)
            return inputs

    def make() -> Any:
        model = uncompiled(example.keras, logits=True, between=ActivityRegularizationLayer())
        loss = example.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=example.keras.optimizers.RMSprop(1e-3), loss=loss)
        return model

    example.trains(make, X, Y)


@TF_KERAS
def test_add_metric_in_a_layer(example: Example) -> None:
    keras = example.keras

    class MetricLoggingLayer(keras.layers.Layer):  # type: ignore[name-defined, misc]
        def call(self, inputs: Any) -> Any:
            self.add_metric(keras.backend.std(inputs), name="std_of_activation", aggregation="mean")
            self.add_metric(inputs, name="mean_activation", aggregation="mean")
            return inputs

    def make() -> Any:
        model = uncompiled(keras, logits=True, between=MetricLoggingLayer())
        model.compile("rmsprop", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    # the standard deviation of a batch is not that of its parts
    example.trains(make, X, Y, not_on_several=("std_of_activation",))


@TF_KERAS
def test_add_loss_and_add_metric_on_a_functional_model(example: Example) -> None:
    keras = example.keras

    def make() -> Any:
        inputs = keras.Input((8,), name="digits")
        hidden = keras.layers.Dense(6, activation="relu", name="dense_1")(inputs)
        model = keras.Model(inputs, keras.layers.Dense(3, name="predictions")(hidden))
        model.add_loss(tf.reduce_sum(hidden) * 0.1)
        model.add_metric(hidden, name="mean_activation", aggregation="mean")
        model.compile(keras.optimizers.RMSprop(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    example.trains(make, X, Y)


@KERAS_3
def test_metric_attribute_of_a_layer(example: Example) -> None:
    keras = example.keras

    class Watches(keras.layers.Layer):  # type: ignore[name-defined, misc]
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.watched = keras.metrics.Mean(name="mean_activation")

        def call(self, inputs: Any) -> Any:
            self.watched.update_state(inputs)
            return inputs

    def make() -> Any:
        model = uncompiled(keras, logits=True, between=Watches())
        model.compile("rmsprop", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    example.trains(make, X, Y)


@PACKAGES
def test_endpoint_layer_without_loss(example: Example) -> None:
    keras = example.keras

    class LogisticEndpoint(keras.layers.Layer):  # type: ignore[name-defined, misc]
        def __init__(self, name: str | None = None) -> None:
            super().__init__(name=name)
            self.loss_fn = keras.losses.BinaryCrossentropy(from_logits=True)

        def call(self, targets: Any, logits: Any) -> Any:
            self.add_loss(self.loss_fn(targets, logits))
            return tf.nn.softmax(logits)

    def make() -> Any:
        inputs, targets = keras.Input((8,), name="inputs"), keras.Input((3,), name="targets")
        predictions = LogisticEndpoint(name="predictions")(targets, keras.layers.Dense(3)(inputs))
        model = keras.Model([inputs, targets], predictions)
        model.compile(optimizer="adam")
        return model

    example.trains(make, {"inputs": X, "targets": ONE_HOT})


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_validation_split(example: Example) -> None:
    example.trains(compiled(example.keras), X, Y, validation_split=0.2, validation_batch_size=7, validation_freq=2)


# Training & evaluation using tf.data Datasets


def batched(*data: Any, rows: int = ROWS) -> Any:
    dataset = tf.data.Dataset.from_tensor_slices(data)
    return dataset.take(rows).batch(BATCH)


@PACKAGES
def test_dataset_with_validation_dataset(example: Example) -> None:
    make, validation = compiled(example.keras), batched(*VALIDATION)
    models, oracle = example.trains(make, batched(X, Y), validation_data=validation, validation_steps=1)
    for scale, model in models.items():
        logs = rk.evaluate(model, batched(X, Y), scale=scale)
        assert logs == pytest.approx(oracle.evaluate(batched(X, Y), verbose=0, return_dict=True), rel=1e-5)
    predictions = rk.predict(next(iter(models.values())), batched(X, Y))
    np.testing.assert_allclose(predictions, oracle.predict(batched(X, Y), verbose=0), atol=1e-5)


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_steps_per_epoch_continues_in_dataset(example: Example) -> None:
    # epochs of three out of five batches; plain Keras needs the dataset repeated to continue at its end
    repeated = (batched(X, Y).repeat(),)
    example.trains(compiled(example.keras), batched(X, Y), plain_data=repeated, epochs=3, steps_per_epoch=3)


# Training & evaluation using PyDataset instances


def example_sequence(keras: Any) -> Any:
    class ExamplePyDataset(keras.utils.PyDataset if hasattr(keras.utils, "PyDataset") else keras.utils.Sequence):
        def __init__(self, x: Any, y: Any, batch_size: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.x, self.y, self.batch_size = x, y, batch_size

        def __len__(self) -> int:
            return int(np.ceil(len(self.x) / float(self.batch_size)))

        def __getitem__(self, index: int) -> Any:
            rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
            return self.x[rows], self.y[rows]

    return ExamplePyDataset


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_sequence_with_validation_sequence(example: Example) -> None:
    sequence = example_sequence(example.keras)
    data, validation = sequence(X, Y, BATCH), sequence(*VALIDATION, BATCH)
    batch_size = 64 if example.package == "keras" else None  # ignored by Keras 3 in the guide, refused by tf_keras
    make = compiled(example.keras)
    models, oracle = example.trains(make, data, validation_data=validation, batch_size=batch_size)
    for scale, model in models.items():
        logs = rk.evaluate(model, validation, scale=scale)
        assert logs == pytest.approx(oracle.evaluate(validation, verbose=0, return_dict=True), rel=1e-5)


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_generator(example: Example) -> None:
    def generate() -> Iterator[Any]:
        while True:
            for start in range(0, ROWS, BATCH):
                yield X[start : start + BATCH], Y[start : start + BATCH], WEIGHT[start : start + BATCH]

    example.trains(compiled(example.keras), generate, steps_per_epoch=4, batch_size=None)


# Using sample weighting and class weighting


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_class_weight(example: Example) -> None:
    example.trains(compiled(example.keras), X, Y, class_weight={0: 1.0, 1: 0.5, 2: 2.0})


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_sample_weight_arrays_and_mask(example: Example) -> None:
    models, oracle = example.trains(compiled(example.keras), X, Y, sample_weight=WEIGHT)
    mask = (np.arange(ROWS) % 3 != 0).astype(np.float32)
    example.fit(models, oracle, X, Y, sample_weight=mask)


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_class_weight_times_sample_weight(example: Example) -> None:
    weights = {0: 1.0, 1: 0.5, 2: 2.0}
    # plain Keras 3 does not accept both together
    both = {"sample_weight": WEIGHT * np.vectorize(weights.get)(Y), "class_weight": None}
    make = compiled(example.keras)
    example.trains(make, X, Y, sample_weight=WEIGHT, class_weight=weights, plain_options=both)


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_sample_weight_in_dataset(example: Example) -> None:
    example.trains(compiled(example.keras), batched(X, Y, WEIGHT))


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_temporal_weights(example: Example) -> None:
    keras = example.keras

    def make() -> Any:
        model = keras.Sequential([keras.layers.Input((6, 4)), keras.layers.Dense(2)])
        model.compile("sgd", keras.losses.MeanSquaredError(), weighted_metrics=["mae"])
        return model

    weights = np.random.default_rng(0).uniform(0, 2, (ROWS, 6)).astype(np.float32)
    example.trains(make, SERIES, SERIES[..., :2], sample_weight=weights)


# Passing data to multi-input, multi-output models


def losses(keras: Any) -> dict[str, Any]:
    return {
        "score_output": keras.losses.MeanSquaredError(),
        "class_output": keras.losses.CategoricalCrossentropy(from_logits=True),
    }


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_losses_and_metrics_as_lists(example: Example) -> None:
    make = two_inputs(
        example.package,
        metrics=lambda keras: [
            [keras.metrics.MeanAbsolutePercentageError(), keras.metrics.MeanAbsoluteError()],
            [keras.metrics.CategoricalAccuracy()],
        ],
        loss_weights=lambda keras: [2.0, 1.0],
    )
    validation = ([IMAGES[:13], SERIES[:13]], [SCORE[:13], CLASS[:13]])
    example.trains(make, [IMAGES, SERIES], [SCORE, CLASS], validation_data=validation)


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_losses_and_metrics_as_dicts(example: Example) -> None:
    make = two_inputs(
        example.package,
        loss=losses,
        metrics=lambda keras: {
            "score_output": [keras.metrics.MeanAbsolutePercentageError(), keras.metrics.MeanAbsoluteError()],
            "class_output": [keras.metrics.CategoricalAccuracy()],
        },
        loss_weights=lambda keras: {"score_output": 2.0, "class_output": 1.0},
    )
    x = {"img_input": IMAGES, "ts_input": SERIES}
    y = {"score_output": SCORE, "class_output": CLASS}
    models, oracle = example.trains(make, x, y)
    trained = next(iter(models.values()))
    for predictions, expected in zip(rk.predict(trained, x), oracle.predict(x, verbose=0), strict=True):
        np.testing.assert_allclose(predictions, expected, atol=1e-5)


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_dataset_of_dicts(example: Example) -> None:
    x = {"img_input": IMAGES, "ts_input": SERIES}
    y = {"score_output": SCORE, "class_output": CLASS}
    example.trains(two_inputs(example.package, loss=losses), batched(x, y))


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_output_without_loss(example: Example) -> None:
    make = two_inputs(
        example.package, loss=lambda keras: [None, keras.losses.CategoricalCrossentropy(from_logits=True)]
    )
    example.trains(make, [IMAGES, SERIES], [SCORE, CLASS])


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_sample_weight_by_output(example: Example) -> None:
    other = WEIGHT[::-1].copy()
    x, y = {"img_input": IMAGES, "ts_input": SERIES}, {"score_output": SCORE, "class_output": CLASS}
    weights = {"class_output": other, "score_output": WEIGHT}
    # plain Keras 3 accepts the weights of a list of outputs only as a list
    plain = {"plain_data": (x, [SCORE, CLASS]), "plain_options": {"sample_weight": [WEIGHT, other]}}
    example.trains(two_inputs(example.package), x, y, sample_weight=weights, batch_size=BATCH, **plain)


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_padded_time_series_from_parquet(example: Example) -> None:
    keras, rng = example.keras, np.random.default_rng(3)
    series = [rng.integers(1, 9, rng.integers(1, 7)).astype(np.int64) for _ in range(ROWS)]
    pq.write_table(pa.table({"series": series, "y": Y}), example.folder / "t.parquet", row_group_size=20)
    source = rk.parquet(example.folder / "t.parquet", x="series", y="y", pad={"series": 6})
    padded = np.stack([np.pad(row, (0, 6 - len(row))) for row in series])

    def make() -> Any:
        layers = keras.layers
        model = keras.Sequential(
            [
                layers.Input((6,)),
                layers.Embedding(9, 4, mask_zero=True),
                layers.GlobalAveragePooling1D(),
                layers.Dense(3),
            ]
        )
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    example.trains(make, source, plain_data=(padded, Y), batch_size=BATCH)


@TF_KERAS
def test_ragged_time_series_from_parquet(example: Example) -> None:
    keras, rng = example.keras, np.random.default_rng(3)
    series = [rng.normal(size=rng.integers(1, 7)).astype(np.float32) for _ in range(ROWS)]
    pq.write_table(pa.table({"series": series, "y": Y}), example.folder / "t.parquet", row_group_size=20)
    source = rk.parquet(example.folder / "t.parquet", x="series", y="y", ragged=["series"])

    def make() -> Any:
        inputs = keras.Input((None,), ragged=True)
        sums = keras.layers.Lambda(lambda rows: tf.stack([tf.reduce_sum(rows, 1), tf.reduce_max(rows, 1)], 1))(inputs)
        model = keras.Model(inputs, keras.layers.Dense(3)(sums))
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    example.trains(make, source, plain_data=(tf.ragged.constant(series), Y), batch_size=BATCH)


# Data frames and tensors


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_data_frames_and_tensors(example: Example) -> None:
    frame, labels = pd.DataFrame(X, columns=[f"f{i}" for i in range(8)]), pd.Series(Y)
    make = compiled(example.keras)
    example.trains(make, frame, labels, validation_split=0.2)
    if example.package == "keras":
        example.trains(make, tf.constant(X), tf.constant(Y))


# Checkpointing models


@KERAS_3
def test_make_or_restore_model(package: str, tmp_path: Path) -> None:
    """The guide's function, unchanged."""
    keras = importlib.import_module(package)
    checkpoint_dir = str(tmp_path / "ckpt")
    os.makedirs(checkpoint_dir)

    def make_or_restore_model() -> Any:
        checkpoints = [checkpoint_dir + "/" + name for name in os.listdir(checkpoint_dir)]
        if checkpoints:
            return keras.models.load_model(max(checkpoints, key=os.path.getctime))
        return seeded(keras, compiled(keras))

    for iterations in (5, 10):
        saves = keras.callbacks.ModelCheckpoint(checkpoint_dir + "/model-loss={loss:.2f}.keras", save_freq=5)
        model = make_or_restore_model()
        rk.fit(model, X, Y, batch_size=BATCH, verbose=0, callbacks=[saves], run=rk.Run(storage=str(tmp_path)))
        assert int(model.optimizer.iterations) == iterations


# Using learning rate schedules


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
def test_schedule_counts_global_batch_once(example: Example) -> None:
    def optimizer(keras: Any) -> Any:
        schedule = keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=3, decay_rate=0.5, staircase=True)
        return keras.optimizers.RMSprop(learning_rate=schedule)

    models, oracle = example.trains(compiled(example.keras, optimizer=optimizer), X, Y)
    for model in (oracle, *models.values()):
        assert int(model.optimizer.iterations) == 10


# All forms of a model


@PACKAGES
def test_trained_model_continues_with_its_optimizer(example: Example) -> None:
    models, oracle = example.models(compiled(example.keras, optimizer="adam"))
    for model in (oracle, *models.values()):
        model.fit(X, Y, epochs=2, verbose=0, shuffle=False)
    example.fit(models, oracle, X, Y)
    example.fit(models, oracle, X, Y)
    for model in models.values():
        assert int(model.optimizer.iterations) == int(oracle.optimizer.iterations)


@PACKAGES
def test_subclassed_model_with_custom_train_step(example: Example) -> None:
    keras = example.keras

    class Own(keras.Model):  # type: ignore[name-defined, misc]
        def __init__(self, units: int = 5, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.units = units
            self.hidden, self.out = keras.layers.Dense(units, activation="relu"), keras.layers.Dense(3)

        def call(self, inputs: Any) -> Any:
            return self.out(self.hidden(inputs))

        def get_config(self) -> dict[str, Any]:
            return {"units": self.units}

        def train_step(self, data: Any) -> Any:
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
            if example.package == "keras":
                gradients = tape.gradient(loss, [v.value for v in self.trainable_variables])
                self.optimizer.apply(gradients, self.trainable_variables)
                for metric in self.metrics:
                    metric.update_state(loss) if metric.name == "loss" else metric.update_state(y, y_pred)
                return {metric.name: metric.result() for metric in self.metrics}
            self.optimizer.minimize(loss, self.trainable_variables, tape=tape)
            return self.compute_metrics(x, y, y_pred, None)

    def make() -> Any:
        model = Own()
        model(X[:1])
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    example.trains(make, X, Y)


@KERAS_3_BY_DEFAULT
@FEWER_SCALES
@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"steps_per_execution": 2}], ids=str)
def test_execution_modes(example: Example, options: dict[str, Any]) -> None:
    example.trains(compiled(example.keras, **options), X, Y, validation_data=VALIDATION)


@PACKAGES
def test_jit_compile(example: Example) -> None:
    models, oracle = example.models(compiled(example.keras, jit_compile=True))
    example.fit(models, oracle, X, Y)
    replicated = seeded(example.keras, compiled(example.keras, jit_compile=True))
    with pytest.warns(UserWarning, match="XLA compiles the collectives of several replicas on GPUs only"):
        example.fit({rk.Scale(replicas_per_worker=2): replicated}, seeded(example.keras, compiled(example.keras)), X, Y)
    assert replicated.jit_compile is True


# Refused before anything starts


@PACKAGES
def test_generator_without_steps_is_refused_on_several_workers(package: str, tmp_path: Path) -> None:
    make = compiled(importlib.import_module(package))
    with pytest.raises(rk.OptionError, match="`steps_per_epoch`"):
        rk.fit(make(), (batch for batch in [(X, Y)]), scale=TWO, run=rk.Run(storage=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@PACKAGES
def test_unserializable_model_is_refused(package: str, tmp_path: Path) -> None:
    keras = importlib.import_module(package)

    class Stubborn(keras.layers.Layer):  # type: ignore[name-defined, misc]
        def __init__(self, table: Any) -> None:
            super().__init__()
            self.table = table

        def call(self, inputs: Any) -> Any:
            return inputs

        def get_config(self) -> dict[str, Any]:
            raise TypeError("no config")

    model = uncompiled(keras, between=Stubborn(object()))
    model.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(rk.ModelError, match="pass a function that builds and compiles"):
        rk.fit(model, X, Y, scale=TWO, run=rk.Run(storage=str(tmp_path)))
    assert not list(tmp_path.iterdir())
