"""Every private name that raykeras uses exists in the installed packages, and missing names are handled."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raykeras.compat import ray_data, versions
from raykeras.compat.keras_api import api_of
from raykeras.compat.versions import PrivateName
from raykeras.core.errors import RaykerasError
from raykeras.data.streaming.reader import gather_tasks, ray_blocks
from raykeras.data.streaming.resources import CpuBudget, reading
from tests.compat.private_names import declared, instance_names, row
from tests.support.sources import small_source

MAX_NAMES = 45
PAGE = Path(__file__).parents[2] / "docs" / "design" / "private-names.md"


@pytest.fixture(autouse=True)
def imported(tensorflow: None) -> None:
    """Import TensorFlow with the devices that other tests of the session need."""


@pytest.fixture
def warned_again() -> Iterator[None]:
    """Reset the warnings that are shown once per process."""
    versions.warn_once.cache_clear()
    yield
    versions.warn_once.cache_clear()


def test_names_exist() -> None:
    for name in declared():
        if not name.is_expected:
            continue
        value = name.get()
        if name.parameters is not None:
            parameters = tuple(inspect.signature(value).parameters)
            assert parameters[: len(name.parameters)] == name.parameters, name.path


def test_number_of_names_is_limited() -> None:
    assert len(declared()) <= MAX_NAMES


def test_names_are_documented() -> None:
    lines = PAGE.read_text().splitlines()
    missing = [row(name) for name in declared() if row(name) not in lines]
    missing += [path for path in instance_names() if not any(line.startswith(f"| `{path}` |") for line in lines)]
    assert not missing, "run `python -m tests.compat.private_names`"
    documented = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert not set(documented) - {name.path for name in declared()} - set(instance_names())


def test_overridden_methods_exist() -> None:
    base = ray_data.CALLBACK.get()
    methods = [name for name in vars(ray_data.pacing(base, 0)) if not name.startswith("_")]
    assert methods and all(hasattr(base, name) for name in methods)


def rows_of_stream(folder: Path) -> list[float]:
    """Stream the 64 rows of a small source through Ray Data; return them sorted."""
    opened, batch_spec, plan = small_source(folder)
    windows = ((0, window) for window in plan(0).windows(0, 1))
    tasks = gather_tasks(windows, opened, batch_spec.row_nbytes)
    blocks = ray_blocks(opened.reader, batch_spec, tasks, reading(CpuBudget(), 1, 1))
    return sorted(np.concatenate([block.tensors[0] for block in blocks]).ravel().tolist())


@pytest.mark.usefixtures("ray_cluster")
def test_attributes_of_instances_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    executors: list[Any] = []
    monkeypatch.setattr(ray_data.ReadAhead, "attach", lambda _, executor: executors.append(executor))
    assert rows_of_stream(tmp_path) == list(range(64))
    make = {
        "ray.data._internal.execution.streaming_executor.StreamingExecutor": lambda: executors[0],
        "ray.data._internal.execution.resource_manager.ResourceManager": lambda: executors[0]._resource_manager,
        **makers(tmp_path),
    }
    for path in instance_names():
        class_path = max((name for name in make if path.startswith(f"{name}.")), key=len, default="")
        assert class_path, f"`makers` must make the instance of {path}"
        if class_path == "keras.optimizers.MultiOptimizer" and not hasattr(keras.optimizers, "MultiOptimizer"):
            continue  # Keras 3.14 and earlier have none
        value = make[class_path]()
        for attribute in path.removeprefix(f"{class_path}.").split("."):
            assert hasattr(value, attribute), path
            value = getattr(value, attribute)


def makers(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return functions that make an instance of a class of Keras, tf_keras or TensorFlow, by the path of the class."""
    import keras
    import tensorflow as tf
    import tf_keras
    from tensorflow.python.eager.context import context

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    legacy_model = tf_keras.Sequential([tf_keras.Input((2,)), tf_keras.layers.Dense(1)])
    legacy_model.compile("adam", "mse", metrics=["mae"])

    def tensorboard(package: Any, its_model: Any) -> Any:
        callback = package.callbacks.TensorBoard(folder)
        callback.set_model(its_model)
        return callback

    def component() -> Any:
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            return tf.Variable(1.0).values[0]

    def legacy_dropout() -> Any:
        dropout = tf_keras.layers.Dropout(0.5)
        dropout(tf.ones((1, 1)), training=True)
        return dropout

    def legacy_dense() -> Any:
        dense = tf_keras.layers.Dense(1, dtype="mixed_float16")
        dense.build((1, 1))
        return dense

    def legacy_adam() -> Any:
        legacy_model.optimizer.build(legacy_model.trainable_variables)
        return legacy_model.optimizer

    return {
        "keras.Model": lambda: model,
        "keras.Sequential": lambda: model,
        "keras.Variable": lambda: keras.Variable(1.0),
        "keras.callbacks.BackupAndRestore": lambda: keras.callbacks.BackupAndRestore(folder / "backup"),
        "keras.callbacks.Callback": keras.callbacks.Callback,
        "keras.callbacks.TensorBoard": lambda: tensorboard(keras, model),
        "keras.losses.SparseCategoricalCrossentropy": keras.losses.SparseCategoricalCrossentropy,
        "keras.optimizers.AdamW": keras.optimizers.AdamW,
        "tensorflow.Variable": component,
        "tensorflow.data.Iterator": lambda: iter(tf.data.Dataset.range(1)),
        "tensorflow.python.eager.context.Context": context,
        "tf_keras.Input": lambda: tf_keras.Input((1,)),
        "tf_keras.Model": lambda: legacy_model,
        "tf_keras.callbacks.History": tf_keras.callbacks.History,
        "tf_keras.callbacks.TensorBoard": lambda: tensorboard(tf_keras, legacy_model),
        "tf_keras.layers.Dense": legacy_dense,
        "tf_keras.layers.Dropout": legacy_dropout,
        "tf_keras.losses.SparseCategoricalCrossentropy": tf_keras.losses.SparseCategoricalCrossentropy,
        "tf_keras.optimizers.Adam": legacy_adam,
        "tf_keras.optimizers.legacy.Adam": tf_keras.optimizers.legacy.Adam,
    }


@pytest.mark.usefixtures("ray_cluster", "warned_again")
def test_stream_reads_all_rows_without_name_of_ray_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = ray_data.CALLBACK
    monkeypatch.setattr(ray_data, "CALLBACK", dataclasses.replace(name, path=f"{name.path}Gone"))
    with pytest.warns(UserWarning, match="Gone") as warned:
        assert rows_of_stream(tmp_path) == list(range(64))
    assert len([warning for warning in warned if "Gone" in str(warning.message)]) == 1


@pytest.mark.usefixtures("ray_cluster", "warned_again")
def test_stream_reads_all_rows_without_attribute_of_ray_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_data, "_POLICIES", "_gone")
    with pytest.warns(UserWarning, match="no attribute '_gone'. Without it, a stream may read twice as far ahead"):
        assert rows_of_stream(tmp_path) == list(range(64))


def name_of(path: str) -> PrivateName:
    return next(name for name in declared() if name.path == path)


def test_missing_name_of_keras_raises_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    name = name_of("keras.src.losses.loss:scale_loss_for_distribution")
    monkeypatch.delattr("keras.src.losses.loss.scale_loss_for_distribution")
    with pytest.raises(RaykerasError, match=r"raykeras needs .*; keras 3\.\S+ does not have it. Install `keras>=3.12"):
        name.get()


@pytest.mark.usefixtures("warned_again")
def test_random_states_are_found_without_private_name_of_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    import keras
    from tensorflow.python.ops import stateful_random_ops

    monkeypatch.delattr(stateful_random_ops, "global_generator")
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dropout(0.5)])
    with pytest.warns(UserWarning, match="Without it, its random numbers differ after a resume"):
        states = api_of(model).seed_states(model)
    assert len(states) == 1
