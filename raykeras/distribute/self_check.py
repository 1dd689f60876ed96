"""Check whether several replicas give the results of one with an untested version of Keras.

A small model is trained for two steps on all replicas and once more on one, and the results are compared. This takes
about a second, once in a process. It covers what `raykeras.distribute.exact` replaces in Keras: losses with and without
weights, regularizers, metrics, and the clipping of gradients, with batches that the replicas do not divide evenly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.versions import TESTED, is_tested
from raykeras.core.errors import ModelError, RaykerasError
from raykeras.data.batch_spec import BatchSpec, ElementSpec
from raykeras.distribute.exact import building, exact

_NUM_STEPS, _NUM_FEATURES = 2, 3
_RTOL, _ATOL = 1e-5, 1e-6
_CLIP_VALUE = 0.2  # some gradients are larger, others smaller

_BATCH_SPEC = BatchSpec(
    (
        ElementSpec("x", None, (), "dense", "float32", (_NUM_FEATURES,)),
        ElementSpec("y", None, (), "dense", "float32", (1,)),
        ElementSpec("sample_weight", None, (), "dense", "float32", ()),
    ),
    (),
    {},
    (),
    {},
)

_verdicts: dict[tuple[str, str], str] = {}
"""Why a version of a package cannot be used, by package and version; empty if it can."""


def check_version(api: KerasAPI, strategy: tf.distribute.Strategy | None) -> None:
    """Check that several replicas give the results of one with the installed version of Keras.

    A version outside the tested range must pass a self-check. All workers must call this together.

    Args:
        api: The model's Keras package.
        strategy: None for a single replica, which needs no check.

    Raises:
        ModelError: The version is not tested, and the self-check failed.
    """
    if strategy is None or is_tested(api.name, api.version):
        return
    version = (api.name, api.version)
    if version not in _verdicts:
        _verdicts[version] = _difference(api, strategy)
    if _verdicts[version]:
        raise ModelError(
            f"Several replicas need {api.name}{TESTED[api.name]}, with which raykeras is tested, or a version that "
            f"gives the same results; got {api.name} {api.version}, which does not: {_verdicts[version]} Install "
            f"`{api.name}{TESTED[api.name]}`, or train on one replica."
        )


def _difference(api: KerasAPI, strategy: tf.distribute.Strategy) -> str:
    """Return how the results of all replicas differ from those of one; an empty string if they do not."""
    num_rows = 2 * strategy.num_replicas_in_sync + 1  # of a batch
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=(_NUM_STEPS * num_rows, *tensor.shape)).astype("float32") for tensor in _BATCH_SPEC.tensors
    ]
    arrays[-1] = np.abs(arrays[-1])
    try:
        expected = _train(_build(api), tf.data.Dataset.from_tensor_slices(tuple(arrays)).batch(num_rows))
        with strategy.scope(), building(api, strategy):
            model = _build(api)
        dataset = strategy.distribute_datasets_from_function(lambda context: _part(arrays, num_rows, context))
        sample = [tf.constant(array[:num_rows]) for array in arrays]
        with exact(model, api, _BATCH_SPEC, strategy, sample):
            results = _train(model, dataset)
    except RaykerasError as error:
        return str(error)
    except Exception as error:  # What another version raises is unknown.
        return f"{type(error).__name__}: {error}"
    differing = [name for name in expected if not np.allclose(results.get(name, np.nan), expected[name], _RTOL, _ATOL)]
    return f"after {_NUM_STEPS} steps, these differ: {', '.join(differing)}." if differing else ""


def _build(api: KerasAPI) -> Any:
    """Return a compiled model that draws no random numbers, which would change those of the user's model."""
    keras, rng = api.module, np.random.default_rng(1)
    dense = keras.layers.Dense
    layers = [
        dense(4, "tanh", kernel_initializer="zeros", kernel_regularizer="l2", name="hidden"),
        dense(1, kernel_initializer="zeros", name="output"),
    ]
    model = keras.Sequential([keras.layers.InputLayer((_NUM_FEATURES,), name="input"), *layers], name="self_check")
    model.set_weights([rng.normal(size=weight.shape).astype("float32") for weight in model.get_weights()])
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, clipvalue=_CLIP_VALUE, name="optimizer")
    model.compile(optimizer, "mse", metrics=["mae"], weighted_metrics=["mse"], jit_compile=False)
    return model


def _train(model: Any, dataset: Any) -> dict[str, Any]:
    """Train for the steps of an epoch; return the weights and the last value of each metric by name."""
    history = model.fit(dataset, steps_per_epoch=_NUM_STEPS, verbose=0, shuffle=False).history
    weights = {f"weight {i}": weight for i, weight in enumerate(model.get_weights())}
    return {**{name: values[-1] for name, values in history.items()}, **weights}


def _part(arrays: list[np.ndarray], num_rows: int, context: tf.distribute.InputContext) -> tf.data.Dataset:
    """Return the elements of the replicas of one worker, step after step, replica after replica.

    Args:
        arrays: All rows.
        num_rows: Rows of a global batch.
        context: Tells the worker and the number of replicas.
    """
    num_replicas = context.num_replicas_in_sync
    num_local = num_replicas // context.num_input_pipelines
    first = context.input_pipeline_id * num_local
    cuts = [num_rows * i // num_replicas for i in range(num_replicas + 1)]

    def rows(step: int, replica: int) -> tf.data.Dataset:
        part = slice(step * num_rows + cuts[replica], step * num_rows + cuts[replica + 1])
        batch = tuple(tf.constant(array[part]) for array in arrays)
        return tf.data.Dataset.from_tensors((batch, tf.constant(num_rows, tf.int64)))

    elements = [rows(step, first + i) for step in range(_NUM_STEPS) for i in range(num_local)]
    dataset = elements[0]
    for element in elements[1:]:
        dataset = dataset.concatenate(element)
    return dataset
