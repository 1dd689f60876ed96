"""Nested inputs and outputs, None for optional inputs, and outputs in dicts are accepted as in plain Keras."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import raykeras as rk
from tests.support.compare import assert_same_training
from tests.support.models import BATCH, CLASS, IN_PROCESS, ROWS, SCALES, SCORE, TWO, X

ONE = SCALES["1x1"]
ALL = pytest.mark.parametrize("scale", [*SCALES.values(), TWO], ids=[*SCALES, "2x1"])
NESTED_Y = {"score": (SCORE, None), "both": {"class": CLASS, "score": SCORE}}


class OptionalSum(keras.layers.Layer):
    def call(self, x: Any, other: Any = None) -> Any:
        return x if other is None else x + other


def optional_input(*, is_sequence: bool = False) -> Any:
    x, other = keras.Input((8,), name="x"), keras.Input((8,), name="other", optional=True)
    outputs = keras.layers.Dense(1)(OptionalSum()(x, other))
    model = keras.Model([x, other] if is_sequence else {"x": x, "other": other}, outputs)
    model.compile("sgd", "mse")
    return model


def nested_outputs() -> Any:
    inputs = keras.Input((8,))
    score, unused, other = (keras.layers.Dense(1, name=name)(inputs) for name in "abc")
    label = keras.layers.Dense(5, activation="softmax")(inputs)
    model = keras.Model(inputs, {"score": (score, unused), "both": {"class": label, "score": other}})
    losses = {"score": ("mse", None), "both": {"class": "categorical_crossentropy", "score": "mae"}}
    model.compile("sgd", losses)
    return model


def dict_outputs(package: Any) -> Any:
    """Return a model whose outputs have other names than their layers."""
    package.utils.set_random_seed(0)
    inputs = package.Input((8,))
    outputs = {"score": package.layers.Dense(1, name="a")(inputs), "class": package.layers.Dense(5, name="b")(inputs)}
    model = package.Model(inputs, outputs)
    model.compile("sgd", {"score": "mse", "class": package.losses.CategoricalCrossentropy(from_logits=True)})
    return model


def batches(*arrays: Any) -> Iterator[Any]:
    """Yield the batches of nested arrays repeatedly."""
    while True:
        for start in range(0, ROWS, BATCH):
            yield keras.tree.map_structure(lambda a, at=start: None if a is None else a[at : at + BATCH], arrays)


def assert_trains_as_keras(build: Callable[[], Any], x: Any, y: Any, scale: rk.Scale, folder: Path, **data: Any) -> Any:
    """Train on arrays, compare with plain Keras, and return the model and the plain one."""
    models = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        models.append(build())
    model, plain = models
    options = {"epochs": 2, "batch_size": BATCH, "shuffle": False, "verbose": 0, **data}
    expected = plain.fit(x, y, **options)
    result = rk.fit(model, x, y, scale=scale, run=rk.Run(storage=str(folder)), **options)
    assert_same_training(result, expected.history, plain)
    return model, plain


@pytest.mark.usefixtures("two_workers")
@ALL
def test_nested_outputs_match_keras(scale: rk.Scale, tmp_path: Path) -> None:
    model, plain = assert_trains_as_keras(nested_outputs, X, NESTED_Y, scale, tmp_path, validation_data=(X, NESTED_Y))
    expected = plain.evaluate(X, NESTED_Y, batch_size=BATCH, verbose=0, return_dict=True)
    assert rk.evaluate(model, X, NESTED_Y, batch_size=BATCH, scale=scale) == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("two_workers")
@pytest.mark.parametrize("is_sequence", [False, True], ids=["dict", "list"])
@ALL
def test_optional_input_without_data_matches_keras(scale: rk.Scale, is_sequence: bool, tmp_path: Path) -> None:
    x: Any = [X, None] if is_sequence else {"x": X, "other": None}
    model, plain = assert_trains_as_keras(lambda: optional_input(is_sequence=is_sequence), x, SCORE, scale, tmp_path)
    expected = plain.predict(x, verbose=0)
    np.testing.assert_allclose(rk.predict(model, x, scale=scale), expected, rtol=1e-4, atol=1e-6)


@ALL
def test_optional_input_of_generator_matches_keras(scale: rk.Scale, tmp_path: Path, two_workers: None) -> None:
    x = {"x": X, "other": None}
    keras.utils.set_random_seed(0)
    plain = optional_input()
    expected = plain.fit(batches(x, SCORE), steps_per_epoch=5, epochs=2, verbose=0).history
    keras.utils.set_random_seed(0)
    run = rk.Run(storage=str(tmp_path))
    data = batches(x, SCORE)
    result = rk.fit(optional_input(), data, steps_per_epoch=5, epochs=2, verbose=0, scale=scale, run=run)
    assert_same_training(result, expected, plain)


def test_required_input_without_data_is_refused(tmp_path: Path) -> None:
    inputs = {name: keras.Input((8,), name=name) for name in ("a", "b")}
    model = keras.Model(inputs, keras.layers.Add()(list(inputs.values())))
    model.compile("sgd", "mse")
    with pytest.raises(rk.ModelError, match="'b' is not optional"):
        rk.fit(model, {"a": X, "b": None}, X, verbose=0, run=rk.Run(storage=str(tmp_path)))
    with pytest.raises(rk.OptionError, match="x must contain at least one array"):
        rk.fit(model, {"a": None, "b": None}, X, verbose=0, run=rk.Run(storage=str(tmp_path)))


@pytest.mark.parametrize("package", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_targets_use_keys_of_output_dict(package: Any, tmp_path: Path) -> None:
    y = {"class": CLASS, "score": SCORE}
    model, _ = assert_trains_as_keras(lambda: dict_outputs(package), X, y, ONE, tmp_path)
    with pytest.raises(rk.ModelError, match="got 'b'"):
        rk.fit(model, X, {"b": CLASS, "score": SCORE}, verbose=0, run=rk.Run(storage=str(tmp_path)))


@pytest.mark.parametrize("form", ["arrays", "dataset"])
def test_epoch_ends_with_data_before_steps_per_epoch(form: str, tmp_path: Path) -> None:
    def build() -> Any:
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    x, y, size = X, SCORE, {"batch_size": BATCH}
    if form == "dataset":
        x, y, size = tf.data.Dataset.from_tensor_slices((X, SCORE)).batch(BATCH), None, {"batch_size": None}
    with pytest.warns(UserWarning, match="`steps_per_epoch=9` and data of 5"):
        assert_trains_as_keras(build, x, y, ONE, tmp_path, steps_per_epoch=9, **size)


def sparse_batches() -> Iterator[Any]:
    for x, y in itertools.islice(batches(X * (X > 0), SCORE), 10):
        yield tf.sparse.from_dense(x), y


@pytest.mark.filterwarnings("default:Sparse batches:UserWarning")  # otherwise an error
def test_sparse_batches_are_converted_to_dense(tmp_path: Path) -> None:
    def build() -> Any:
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
        model.compile("adam", "mse")
        return model

    plain = build()
    expected = plain.fit(X * (X > 0), SCORE, batch_size=BATCH, shuffle=False, epochs=2, verbose=0).history
    run, options = rk.Run(storage=str(tmp_path)), {"steps_per_epoch": 5, "epochs": 2, "verbose": 0}
    with pytest.warns(UserWarning, match="are converted to dense arrays; got a SparseTensor"):
        result = rk.fit(build, sparse_batches(), run=run, **options)
    assert_same_training(result, expected, plain)
    with pytest.raises(rk.OptionError, match="x must be dense"):
        rk.fit(build, next(sparse_batches())[0], SCORE[:BATCH], run=run, verbose=0)


@pytest.mark.parametrize("form", ["arrays", "generator"])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_class_weight_per_pixel_matches_keras(form: str, is_weighted: bool, tmp_path: Path) -> None:
    """Plain Keras 3 refuses it; tf_keras does not."""
    rng, num_rows = np.random.default_rng(0), 4 * BATCH  # tf_keras cannot multiply weights of a shorter last batch
    x = rng.normal(size=(num_rows, 3, 4, 2)).astype(np.float32)
    y = np.eye(5, dtype=np.float32)[rng.integers(0, 5, (num_rows, 3, 4))]
    weights = (rng.uniform(0.5, 2, num_rows).astype(np.float32),) if is_weighted else ()

    def build() -> Any:
        tf_keras.utils.set_random_seed(0)
        model = tf_keras.Sequential([tf_keras.Input((3, 4, 2)), tf_keras.layers.Conv2D(5, 1)])
        model.compile("sgd", tf_keras.losses.CategoricalCrossentropy(from_logits=True))
        return model

    options = {"class_weight": {label: 1.0 + label for label in range(5)}, "epochs": 2, "verbose": 0}
    plain = build()
    arrays = {"sample_weight": weights[0]} if weights else {}
    expected = plain.fit(x, y, batch_size=BATCH, shuffle=False, **arrays, **options).history
    run = rk.Run(storage=str(tmp_path))
    for scale in SCALES.values():
        if form == "arrays":
            result = rk.fit(build, x, y, batch_size=BATCH, shuffle=False, **arrays, run=run, scale=scale, **options)
        else:
            rows = (slice(at, at + BATCH) for at in itertools.cycle(range(0, num_rows, BATCH)))
            data = (tuple(array[some] for array in (x, y, *weights)) for some in rows)
            result = rk.fit(build, data, steps_per_epoch=4, run=run, scale=scale, **options)
        assert_same_training(result, expected, plain)


@pytest.mark.filterwarnings("ignore:Keras cannot serialise:UserWarning")
@IN_PROCESS
def test_optimizer_without_config_matches_keras(scale: rk.Scale, tmp_path: Path) -> None:
    def build() -> Any:
        tf_keras.utils.set_random_seed(0)
        model = tf_keras.Sequential([tf_keras.Input((8,)), tf_keras.layers.Dense(1)])
        model.compile(tf.compat.v1.train.RMSPropOptimizer(0.01), "mse")
        return model

    plain, run = build(), rk.Run(storage=str(tmp_path))
    expected = plain.fit(X, SCORE, batch_size=BATCH, shuffle=False, verbose=0).history
    result = rk.fit(build(), X, SCORE, batch_size=BATCH, shuffle=False, verbose=0, scale=scale, run=run)
    assert_same_training(result, expected, plain)


def test_one_target_for_all_outputs_matches_tf_keras(tmp_path: Path) -> None:
    def build() -> Any:
        tf_keras.utils.set_random_seed(0)
        inputs = tf_keras.Input((8,))
        hidden = tf_keras.layers.Dense(1, name="first")(inputs)
        model = tf_keras.Model(inputs, [hidden, tf_keras.layers.Dense(1, name="second")(hidden)])
        model.compile("sgd", {"second": "mse"}, metrics={"first": "mae"})
        return model

    plain, run = build(), rk.Run(storage=str(tmp_path))
    expected = plain.fit(X, SCORE, batch_size=BATCH, shuffle=False, verbose=0).history
    scale = rk.Scale(replicas_per_worker=2)
    result = rk.fit(build, X, SCORE, batch_size=BATCH, shuffle=False, verbose=0, scale=scale, run=run)
    assert_same_training(result, expected, plain)


def forms_of_x(package: Any) -> dict[str, Callable[[], Any]]:
    """Return the forms in which x can be passed without y."""
    sequence = package.utils.PyDataset if package is keras else package.utils.Sequence

    class Batches(sequence):  # type: ignore[misc, valid-type]
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return (X[index * BATCH : (index + 1) * BATCH],)

    def wrap(x: Any) -> Any:
        return (x,) if package is keras else x  # Keras 3 requires a tuple; tf_keras would unpack it

    def dataset(x: Any) -> Any:
        return tf.data.Dataset.from_tensor_slices(x).batch(BATCH)

    return {
        "array": lambda: X,
        "dict": lambda: {"x": X},
        "list": lambda: [X],
        "dataset": lambda: dataset(X),
        "dataset of tuples": lambda: dataset((X,)),
        "dataset of dicts": lambda: dataset({"x": X}),
        "sequence": Batches,
        "generator": lambda: (wrap(X[i : i + BATCH]) for i in (0, BATCH)),
    }


@pytest.mark.parametrize("package", [keras, tf_keras], ids=["keras", "tf_keras"])
@pytest.mark.parametrize("form", forms_of_x(keras))
def test_x_without_y_reaches_train_step_as_in_keras(package: Any, form: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Model(package.Model):  # type: ignore[misc, name-defined]
        def train_step(self, data: Any) -> Any:
            seen.append(tf.nest.map_structure(lambda _: "x", data))
            return super().train_step(data)

    def model() -> Any:
        package.utils.set_random_seed(0)
        inputs = package.Input((8,), name="x")
        made = Model(inputs, package.layers.Dense(1, activity_regularizer="l2")(inputs))
        made.compile("sgd")
        return made

    make, oracle = forms_of_x(package)[form], model()
    options: dict[str, Any] = {"steps_per_epoch": 2} if form == "generator" else {"shuffle": False}
    if form in ("array", "dict", "list"):
        options["batch_size"] = BATCH
    history = oracle.fit(make(), **options, verbose=0).history
    expected = seen[-1]
    for scale in (ONE, SCALES["1x2"]) if form == "array" else (ONE,):
        seen.clear()
        run = rk.Run(storage=str(tmp_path))
        result = rk.fit(model(), make(), **options, scale=scale, run=run, verbose=0)
        assert seen[-1] == expected
        assert_same_training(result, history, oracle)
