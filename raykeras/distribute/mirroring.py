"""Place the variables of an existing model under a strategy, and take them back.

Nothing is serialized, so that any model can be trained in place on several replicas of one process. The variables
remain the same objects; only what they consist of is exchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from raykeras.compat import keras_variables, tf_keras_variables
from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.tf_variables import Contents, assign, contents_of, like, set_contents, value_of
from raykeras.distribute.strategy import scope

_MODULES: dict[str, Any] = {"keras": keras_variables, "tf_keras": tf_keras_variables}

_STEP_FUNCTIONS = ("train_function", "test_function", "predict_function", "train_tf_function")


def needs_mirroring(model: Any, api: KerasAPI, strategy: tf.distribute.Strategy | None) -> bool:
    """Return whether the variables of a model belong to another strategy, or to none."""
    return _MODULES[api.name].strategy_of(model) is not strategy


@contextlib.contextmanager
def mirrored(model: Any, api: KerasAPI, strategy: tf.distribute.Strategy | None) -> Iterator[None]:
    """Keep a model's variables under a strategy while the block runs.

    Afterwards the variables belong to the model's original strategy again, with the values of the end of the block.

    Args:
        model: A model that was created elsewhere.
        api: The model's Keras package.
        strategy: None for a single replica.
    """
    names = _MODULES[api.name]
    original_strategy = names.strategy_of(model)
    originals: list[tuple[Any, Contents]] = []
    strategies: list[tuple[Any, str, Any]] = []
    try:
        originals += _replace(names.variables(model), strategy)
        strategies += names.set_strategy(model, strategy, tf.distribute.get_strategy())
        _forget_functions(model)
        yield
    finally:
        is_original = {id(variable) for variable, _ in originals}
        created = [variable for variable in names.variables(model) if id(variable) not in is_original]
        for variable, contents in originals:
            value = value_of(variable)
            set_contents(variable, contents)
            assign(variable, value)
        _replace(created, original_strategy)
        names.set_strategy(model, original_strategy, tf.distribute.get_strategy())
        for holder, name, value in strategies:
            setattr(holder, name, value)
        _forget_functions(model)


def _replace(variables: Sequence[Any], strategy: tf.distribute.Strategy | None) -> list[tuple[Any, Contents]]:
    """Place variables under a strategy; return them with their previous contents."""
    values = [value_of(variable) for variable in variables]
    with scope(strategy):
        created = [like(variable, value) for variable, value in zip(variables, values, strict=True)]
    previous = [(variable, contents_of(variable)) for variable in variables]
    for variable, new in zip(variables, created, strict=True):
        set_contents(variable, contents_of(new))
    return previous


def _forget_functions(model: Any) -> None:
    """Drop functions that were traced with the contents that variables had before."""
    for name in _STEP_FUNCTIONS:
        if getattr(model, name, None) is not None:
            setattr(model, name, None)
