"""Place the variables of an existing Keras 3 model under a strategy, and take them back.

Nothing is serialized, so that any model can be trained in place on several replicas of one process. Each Keras variable
wraps a TensorFlow variable; only the latter has to be created under the strategy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.keras_variables import (
    is_created,
    rekeyed,
    restore_strategies,
    set_strategy,
    set_wrapped,
    strategy_of,
)
from raykeras.distribute.strategy import scope


def is_made_elsewhere(model: Any, api: KerasAPI, strategy: tf.distribute.Strategy | None) -> bool:
    """Return whether the variables of a Keras 3 model belong to another strategy, or to none."""
    return not api.is_legacy and strategy_of(model) is not strategy


@contextlib.contextmanager
def mirrored(model: Any, api: KerasAPI, strategy: tf.distribute.Strategy | None) -> Iterator[None]:
    """Keep a model's variables under a strategy while the block runs.

    Afterwards the model has its original TensorFlow variables again, with the values of the end of the block.

    Args:
        model: A Keras 3 model that was created elsewhere.
        api: Keras 3.
        strategy: None for a single replica.
    """
    variables = _variables(model, api)
    original_of = {id(variable): variable.value for variable in variables}
    values = [variable.numpy() for variable in variables]
    with rekeyed(model, variables), scope(strategy):
        for variable, value in zip(variables, values, strict=True):
            set_wrapped(variable, value)
        original_strategies = set_strategy(model, strategy, tf.distribute.get_strategy())
    try:
        yield
    finally:
        variables = _variables(model, api)
        with rekeyed(model, variables):
            for variable in variables:
                original = original_of.get(id(variable))
                if original is None:  # created in the block
                    set_wrapped(variable, variable.numpy())
                else:
                    original.assign(variable.numpy())
                    set_wrapped(variable, original)
            restore_strategies(original_strategies)


def _variables(model: Any, api: KerasAPI) -> list[Any]:
    """Return each Keras variable once; plain TensorFlow variables stay as they are."""
    variables = [*api.variables(model), *api.metric_variables(model), *api.seed_states(model)]
    return list({id(variable): variable for variable in variables if is_created(variable)}.values())
