"""Unusual models and metrics that plain Keras trains: not serialisable, not built, metrics with several values."""

from __future__ import annotations

import csv
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import raykeras as rk
from raykeras.checkpoint.model_io import load_model, save_model
from raykeras.compat.keras_api import KerasAPI
from tests.support.compare import assert_same_training, assert_same_weights
from tests.support.models import BATCH, PACKAGES, SCALES, TWO, X, Y
from tests.support.resuming import events_of

ONE_HOT = np.eye(3, dtype=np.float32)[Y]
EVERY_SCALE = [*SCALES.values(), TWO]
OPTIONS = {"batch_size": BATCH, "epochs": 2, "shuffle": False, "verbose": 0}
VALIDATION = (X[:29] + 0.1, Y[:29])


def plain_fit(package: str, build: Callable[[], Any], *data: Any, **options: Any) -> tuple[dict[str, Any], Any]:
    """Train in plain Keras; return the history and the model."""
    importlib.import_module(package).utils.set_random_seed(0)
    model = build()
    return model.fit(*data, **{**OPTIONS, **options}).history, model


def vae(package: str) -> Callable[[], Any]:
    """Return a function that builds a model of two others, with a custom train step and without `get_config`."""

    def build() -> Any:
        keras = importlib.import_module(package)

        class VAE(keras.Model):  # type: ignore[misc]
            def __init__(self, encoder: Any, decoder: Any) -> None:
                super().__init__()
                self.encoder, self.decoder = encoder, decoder
                self.loss_tracker = keras.metrics.Mean(name="reconstruction")

            @property
            def metrics(self) -> list[Any]:
                return [self.loss_tracker]

            def train_step(self, data: Any) -> Any:
                x = data[0] if isinstance(data, tuple) else data
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(tf.square(x - self.decoder(self.encoder(x))))
                variables = self.trainable_variables
                gradients = tape.gradient(loss, variables)
                self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
                self.loss_tracker.update_state(loss)
                return {"reconstruction": self.loss_tracker.result()}

        encoder = keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(2)])
        decoder = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(8)])
        model = VAE(encoder, decoder)
        model.compile(optimizer=keras.optimizers.Adam(0.01))
        return model

    build.uses = package  # type: ignore[attr-defined]
    return build


def with_function(package: str) -> Callable[[], Any]:
    """Return a function that builds a model with a layer that takes a function and has no `get_config`."""

    def build() -> Any:
        keras = importlib.import_module(package)

        class Applies(keras.layers.Layer):  # type: ignore[misc]
            def __init__(self, function: Any) -> None:
                super().__init__()
                self.function = function

            def call(self, inputs: Any) -> Any:
                return self.function(inputs)

        model = keras.Sequential([keras.layers.Input((8,)), Applies(lambda x: x * 2), keras.layers.Dense(3)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.01), loss)
        return model

    build.uses = package  # type: ignore[attr-defined]
    return build


@pytest.mark.parametrize(
    ("make", "data", "package"),  # tf_keras serialises the first, although it cannot load it
    [(vae, (X,), "keras"), (with_function, (X, Y), "keras"), (with_function, (X, Y), "tf_keras")],
    ids=["vae", "function", "function-tf_keras"],
)
def test_unserializable_model_is_trained_and_resumed(
    make: Any, data: Any, package: str, kept_workers: None, tmp_path: Path
) -> None:
    build = make(package)
    history, model = plain_fit(package, build, *data, epochs=4)
    for number, scale in enumerate([rk.Scale()] if make is vae else [rk.Scale(), TWO]):
        run = rk.Run(storage=str(tmp_path), name=f"{package}-{number}", checkpoint_every=3)
        with pytest.warns(UserWarning, match="cannot serialise the model .* no architecture") as w:
            rk.fit(build, *data, **{**OPTIONS, "epochs": 2}, scale=scale, run=run)
        assert len([warning for warning in w if "serialise" in str(warning.message)]) == 1
        with pytest.warns(UserWarning, match="cannot serialise"):
            result = rk.fit(build, *data, **{**OPTIONS, "epochs": 4}, scale=scale, run=run)
        assert_same_training(result, history, model, message=str(scale))
        loaded = rk.Result(result.history, result.epoch, {}, result.path, build=build).model()
        assert_same_weights(loaded, model)
        newest = result.checkpoints[-1]
        assert sorted(os.listdir(newest.path)) == ["model.weights.h5", "state.npz", "train_state.json"]
        with pytest.raises(rk.CheckpointError, match="holds the weights only"):
            newest.load_model()
        with pytest.raises(rk.CheckpointError, match="holds the weights only"):
            rk.predict(newest, X)


@PACKAGES
@pytest.mark.filterwarnings("ignore:Keras cannot serialise")
def test_model_without_call_is_trained_in_place(package: str, tmp_path: Path) -> None:
    history, model = plain_fit(package, vae(package), X)
    importlib.import_module(package).utils.set_random_seed(0)
    mine = vae(package)()
    result = rk.fit(mine, X, **OPTIONS, run=rk.Run(storage=str(tmp_path)))
    assert_same_training(result, history, model)
    assert_same_weights(mine, model)


@PACKAGES
def test_step_without_compute_loss_is_refused_on_several_replicas(package: str, tmp_path: Path) -> None:
    with pytest.raises(rk.ModelError, match=r"must compute its loss with `self\.compute_loss"):
        rk.fit(vae(package), X, **OPTIONS, scale=SCALES["1x2"], run=rk.Run(storage=str(tmp_path)))


@PACKAGES
def test_unserializable_instance_is_refused_on_workers(package: str, tmp_path: Path) -> None:
    with pytest.raises(rk.ModelError, match="pass a function that builds and compiles the model"):
        rk.fit(vae(package)(), X, **OPTIONS, scale=TWO, run=rk.Run(storage=str(tmp_path)))


@PACKAGES
def test_unbuilt_instance_is_trained_in_place(package: str, kept_workers: None, tmp_path: Path) -> None:
    keras = importlib.import_module(package)

    def build() -> Any:
        model = keras.Sequential([keras.layers.Dense(4, activation="relu"), keras.layers.Dense(3)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
        return model

    history, model = plain_fit(package, build, X, Y)
    for scale in EVERY_SCALE:
        keras.utils.set_random_seed(0)
        mine = build()
        result = rk.fit(mine, X, Y, **OPTIONS, scale=scale, run=rk.Run(storage=str(tmp_path)))
        assert_same_training(result, history, model, message=str(scale))
        assert_same_weights(mine, model)
        assert int(mine.optimizer.iterations) == int(model.optimizer.iterations)


def test_layer_quantized_after_it_was_built_gets_its_own_values(kept_workers: None, tmp_path: Path) -> None:
    import keras

    def build() -> Any:
        layer = keras.layers.Dense(3)
        layer.build((None, 8))
        layer.quantize("float8")  # a loaded layer creates the variables of its quantization before kernel and bias
        model = keras.Sequential([keras.Input((8,)), layer])
        model.compile("sgd", "mse")
        return model

    history, model = plain_fit("keras", build, X, ONE_HOT)
    keras.utils.set_random_seed(0)
    mine = build()
    result = rk.fit(mine, X, ONE_HOT, **OPTIONS, scale=TWO, run=rk.Run(storage=str(tmp_path)))
    np.testing.assert_allclose(result.history["loss"], history["loss"], rtol=1e-2)  # each replica scales its own rows
    np.testing.assert_allclose(mine.layers[0].kernel, model.layers[0].kernel, rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(mine.predict(X, verbose=0), result.model().predict(X, verbose=0), rtol=1e-6)


@PACKAGES
def test_layer_that_was_frozen_later_stays_frozen(package: str, kept_workers: None, tmp_path: Path) -> None:
    keras = importlib.import_module(package)

    class Block(keras.layers.Layer):  # type: ignore[misc]
        def __init__(self, units: int) -> None:
            super().__init__()
            self.frozen, self.trained = keras.layers.Dense(units), keras.layers.Dense(units)

        def build(self, shape: Any) -> None:
            self.frozen.build(shape)
            self.trained.build(shape)

        def call(self, x: Any) -> Any:
            return self.frozen(x) + self.trained(x)

        def get_config(self) -> dict[str, Any]:
            return {"units": 3}  # without `trainable` of the layers in it

    def build() -> Any:
        block = Block(3)
        block.frozen.trainable = False
        model = keras.Sequential([keras.Input((8,)), block])
        model.compile("adam", "mse")
        return model

    history, model = plain_fit(package, build, X, ONE_HOT)
    keras.utils.set_random_seed(0)
    mine = build()
    result = rk.fit(mine, X, ONE_HOT, **OPTIONS, scale=TWO, run=rk.Run(storage=str(tmp_path)))
    np.testing.assert_allclose(result.history["loss"], history["loss"], rtol=1e-5)
    assert_same_weights(mine, model)
    with pytest.raises(rk.ModelError, match=r"does not say that `trainable` is False\. Add it to `get_config`"):
        rk.fit(mine, X, ONE_HOT, **OPTIONS, scale=TWO, run=rk.Run(storage=str(tmp_path)))


@PACKAGES
@pytest.mark.tf_keras_on_replicas
@pytest.mark.usefixtures("two_workers")
def test_metric_with_a_value_per_class_matches_keras(package: str, several: rk.Scale, tmp_path: Path) -> None:
    def build() -> Any:
        keras = importlib.import_module(package)
        model = keras.Sequential([keras.layers.Input((8,)), keras.layers.Dense(3, activation="softmax")])
        model.compile(keras.optimizers.Adam(0.1), "categorical_crossentropy", metrics=[keras.metrics.F1Score()])
        return model

    build.uses = package  # type: ignore[attr-defined]
    callbacks = importlib.import_module(package).callbacks
    validation = (X[:29] + 0.1, ONE_HOT[:29])
    history, model = plain_fit(package, build, X, ONE_HOT, epochs=4, validation_data=validation)
    expected = model.evaluate(*validation, verbose=0, return_dict=True)
    for number, scale in enumerate([rk.Scale(), TWO] if several == TWO else [several]):
        run = rk.Run(storage=str(tmp_path), name=f"{package}-{number}", checkpoint_every=3, monitor="f1_score")
        options: Any = {"validation_data": validation, "scale": scale, "run": run, "verbose": 2}
        rk.fit(build, X, ONE_HOT, **{**OPTIONS, **options})
        logger = callbacks.CSVLogger(str(tmp_path / "log.csv"))
        result = rk.fit(build, X, ONE_HOT, **{**OPTIONS, **options, "epochs": 4}, callbacks=[logger])
        logs: Any = rk.evaluate(result.model(), *validation, scale=scale)
        listed = rk.evaluate(result.model(), *validation, return_dict=False)
        assert_same_training(result, history, model, message=str(scale))
        assert isinstance(result.history["f1_score"][0], np.ndarray) and isinstance(result.history["loss"][0], float)
        np.testing.assert_allclose(logs["f1_score"], expected["f1_score"], rtol=1e-5)
        np.testing.assert_allclose(listed[1], expected["f1_score"], rtol=1e-5)
        with open(f"{result.path}/history.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        np.testing.assert_allclose(json.loads(rows[3]["val_f1_score"]), history["val_f1_score"][3], rtol=1e-5)
        ended = [event for event in events_of(result.path) if event["event"] == "EpochEnded"]
        np.testing.assert_allclose(ended[0]["logs"]["f1_score"], history["f1_score"][0], rtol=1e-5)


@PACKAGES
def test_vector_in_logs_of_custom_step_matches_keras(package: str, kept_workers: None, tmp_path: Path) -> None:
    def build() -> Any:
        keras = importlib.import_module(package)

        class Norms(keras.Model):  # type: ignore[misc]
            def train_step(self, data: Any) -> Any:
                logs = super().train_step(data)
                return {**logs, "norms": tf.norm(tf.convert_to_tensor(self.layers[-1].kernel), axis=0)}

        inputs = keras.Input((8,))
        model = Norms(inputs, keras.layers.Dense(3, activation="softmax")(inputs))
        model.compile(keras.optimizers.Adam(0.1), "sparse_categorical_crossentropy")
        return model

    build.uses = package  # type: ignore[attr-defined]
    history, model = plain_fit(package, build, X, Y)
    for scale in EVERY_SCALE:
        result = rk.fit(build, X, Y, **OPTIONS, scale=scale, run=rk.Run(storage=str(tmp_path)))
        assert result.history["norms"][0].shape == (3,)
        assert_same_training(result, history, model, message=str(scale))


@PACKAGES
def test_overridden_fit_may_add_callbacks(package: str, tmp_path: Path) -> None:
    """Experiment trackers patch `Model.fit` like this; the run must still resume mid-epoch."""
    keras = importlib.import_module(package)
    batches: list[int] = []
    losses: list[float] = []

    class Counts(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            batches.append(batch)

    class Appended(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_begin(self, logs: Any = None) -> None:
            assert self.model.optimizer is not None and self.params["epochs"] == OPTIONS["epochs"]

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            losses.append(logs["loss"])

    class Fails(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if len(batches) == 8:  # the fourth step of the second epoch
                raise ZeroDivisionError

    class AddsCallbacks(keras.Model):  # type: ignore[misc]
        def fit(self, *args: Any, callbacks: Any = None, **options: Any) -> Any:
            assert isinstance(callbacks, list)
            callbacks.append(Appended())
            return super().fit(*args, callbacks=[*callbacks, Counts()], **options)

    def build(kind: Any = AddsCallbacks) -> Any:
        inputs = keras.Input((8,))
        model = kind(inputs, keras.layers.Dense(3, activation="softmax")(inputs))
        model.compile(keras.optimizers.Adam(0.1), "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    history, model = plain_fit(package, lambda: build(keras.Model), X, Y, validation_data=VALIDATION)
    run = rk.Run(storage=str(tmp_path), name="run", checkpoint_every=3)
    options: Any = {**OPTIONS, "validation_data": VALIDATION, "run": run}
    with pytest.raises(ZeroDivisionError):
        rk.fit(build, X, Y, callbacks=[Fails()], **options)
    assert_same_training(rk.fit(build, X, Y, **options), history, model)
    assert losses == pytest.approx(history["loss"], rel=1e-5)


@PACKAGES
@pytest.mark.parametrize("own", ["ignore_class", "train_step", "compute_loss"])
def test_labels_out_of_range_are_allowed_where_keras_allows_them(own: str, package: str, tmp_path: Path) -> None:
    keras = importlib.import_module(package)

    class Model(keras.Model):  # type: ignore[misc]
        if own == "train_step":

            def train_step(self, data: Any) -> Any:
                x, y = data
                return super().train_step((x, tf.maximum(y, 0)))

        if own == "compute_loss":

            def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, *args: Any, **options: Any) -> Any:
                return super().compute_loss(x, tf.maximum(y, 0), y_pred, *args, **options)

    def build() -> Any:
        inputs = keras.Input((8,))
        model = Model(inputs, keras.layers.Dense(3, activation="softmax")(inputs))
        ignored = -1 if own == "ignore_class" else None
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(ignore_class=ignored))
        return model

    labels = np.where(np.arange(len(Y)) % 5, Y, -1)
    history, model = plain_fit(package, build, X, labels)
    assert_same_training(rk.fit(build, X, labels, **OPTIONS, run=rk.Run(storage=str(tmp_path))), history, model)


@PACKAGES
def test_functions_with_names_of_others_reach_workers(package: str) -> None:
    keras = importlib.import_module(package)
    api = KerasAPI(package)

    def relu(x: Any) -> Any:
        return 5.0 * x

    def scaled(factor: float) -> Callable[[Any], Any]:
        def activation(x: Any) -> Any:
            return factor * x

        return activation

    layers = [keras.layers.Dense(4, activation=relu), keras.layers.Dense(4, activation="relu")]
    layers += [keras.layers.Activation(scaled(factor)) for factor in (2.0, 3.0)]
    model = keras.Sequential([keras.layers.Input((8,)), *layers, keras.layers.Lambda(scaled(4.0))])
    model.compile("sgd", "mse")
    received = load_model(save_model(model, api), api)
    np.testing.assert_allclose(received.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-6)


@PACKAGES
def test_code_in_model_file_is_refused(package: str, kept_workers: None, tmp_path: Path) -> None:
    keras = importlib.import_module(package)
    marker, path = str(tmp_path / "ran"), str(tmp_path / "model.keras")
    layer = keras.layers.Lambda(lambda x: (open(marker, "w").close(), x)[1], output_shape=(8,))
    model = keras.Sequential([keras.layers.Input((8,)), layer, keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.save(path)
    expected = model.predict(X, verbose=0)
    run = {"run": rk.Run(storage=str(tmp_path))}
    for scale in (rk.Scale(), TWO):
        for call, arguments in ((rk.fit, (X, Y)), (rk.evaluate, (X, Y)), (rk.predict, (X,))):
            os.remove(marker) if os.path.exists(marker) else None
            options: Any = {"scale": scale, **(run if call is rk.fit else {})}
            with pytest.raises(rk.ModelError, match="`safe_mode=False`"):
                call(path, *arguments, **options)  # type: ignore[operator]
            assert not os.path.exists(marker), (call, scale)
    np.testing.assert_allclose(rk.predict(path, X, safe_mode=False), expected, atol=1e-6)
    assert os.path.exists(marker)


def test_keras_setting_of_unsafe_deserialization_is_respected(tmp_path: Path) -> None:
    import keras
    from keras.src.saving.serialization_lib import SafeModeScope

    model = keras.Sequential([keras.layers.Input((8,)), keras.layers.Lambda(lambda x: x * 2, output_shape=(8,))])
    model.save(tmp_path / "model.keras")
    with SafeModeScope(None):  # restores what `enable_unsafe_deserialization` changes
        keras.config.enable_unsafe_deserialization()
        np.testing.assert_allclose(rk.predict(tmp_path / "model.keras", X), X * 2)
    with pytest.raises(rk.ModelError, match="must not contain code"):
        rk.predict(tmp_path / "model.keras", X)


def test_model_file_of_older_format_is_refused(tmp_path: Path) -> None:
    """tf_keras would read HDF5 regardless of the file name, and run the code in it."""
    import tf_keras

    from raykeras.checkpoint.model_io import ModelFile

    model = tf_keras.Sequential([tf_keras.layers.Input((8,)), tf_keras.layers.Lambda(lambda x: x * 2)])
    model.save(tmp_path / "model.h5")
    os.rename(tmp_path / "model.h5", tmp_path / "model.keras")
    with pytest.raises(rk.CheckpointError, match=r"must be a `\.keras` file"):
        rk.predict(str(tmp_path / "model.keras"), X)
    with pytest.raises(rk.ModelError, match="It is not a zip archive"):  # replaced after it was checked
        ModelFile(str(tmp_path / "model.keras"), KerasAPI("tf_keras"), safe_mode=True)()
