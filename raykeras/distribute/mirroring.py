"""Place the variables of an existing Keras 3 model under a strategy, and take them back.

Nothing is serialized, so that any model can be trained in place on several replicas of one process. Each Keras variable
wraps a TensorFlow variable; only the latter has to be created under the strategy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from raykeras.compat.keras_api import KerasAPI
from raykeras.distribute.strategy import scope

_STRATEGY_ATTRIBUTE = "_distribute_strategy"  # of a model; None for the default strategy
_STEP_FUNCTIONS = ("train_function", "test_function", "predict_function")


def is_made_elsewhere(model: Any, api: KerasAPI, strategy: tf.distribute.Strategy | None) -> bool:
    """Return whether the variables of a Keras 3 model belong to another strategy, or to none."""
    return not api.is_legacy and getattr(model, _STRATEGY_ATTRIBUTE, None) is not strategy


@contextlib.contextmanager
def mirrored(model: Any, api: KerasAPI, strategy: tf.distribute.Strategy | None) -> Iterator[None]:
    """Keep a model's variables under a strategy while the block runs.

    Afterwards the model has its original TensorFlow variables again, with the values of the end of the block.

    Args:
        model: A Keras 3 model that was created elsewhere.
        api: Keras 3.
        strategy: None for a single replica.
    """
    originals = [(variable, variable._value) for variable in _variables(model, api)]
    variables = [variable for variable, _ in originals]
    original_strategies = [(holder, name, getattr(holder, name)) for holder, name in _strategies(model)]
    values = [variable.numpy() for variable in variables]
    with _rekeyed(model, variables), scope(strategy):
        for variable, value in zip(variables, values, strict=True):
            variable._initialize(value)
        for holder, name, _ in original_strategies:
            setattr(holder, name, strategy if name == _STRATEGY_ATTRIBUTE else strategy or tf.distribute.get_strategy())
    try:
        yield
    finally:
        original_of = {id(variable): value for variable, value in originals}
        variables = _variables(model, api)
        with _rekeyed(model, variables):
            for variable in variables:
                if (value := original_of.get(id(variable))) is None:  # created in the block
                    variable._initialize(variable.numpy())
                else:
                    value.assign(variable.numpy())
                    variable._value = value
            for holder, name, original_strategy in original_strategies:
                setattr(holder, name, original_strategy)


def _variables(model: Any, api: KerasAPI) -> list[Any]:
    """Return each Keras variable once; plain TensorFlow variables stay as they are."""
    variables = [*api.variables(model), *api.metric_variables(model), *api.seed_states(model)]
    return list({id(v): v for v in variables if hasattr(v, "_initialize") and v._value is not None}.values())


def _optimizers(model: Any) -> list[Any]:
    """Return the model's optimizer and those inside it, which scale its loss or share its variables."""
    optimizers = [model.optimizer] if getattr(model, "optimizer", None) is not None else []
    for optimizer in optimizers:
        optimizers += getattr(optimizer, "_inner_optimizers", ())
        optimizers += [optimizer.inner_optimizer] if hasattr(optimizer, "inner_optimizer") else []
    return optimizers


def _strategies(model: Any) -> Iterator[tuple[Any, str]]:
    """Yield each object that holds its strategy, with the name of the attribute."""
    for layer in model._flatten_layers():
        if hasattr(layer, _STRATEGY_ATTRIBUTE):
            yield layer, _STRATEGY_ATTRIBUTE
    for optimizer in _optimizers(model):
        yield optimizer, "_distribution_strategy"


@contextlib.contextmanager
def _rekeyed(model: Any, variables: Sequence[Any]) -> Iterator[None]:
    """Update what optimizers key by TensorFlow variables after the block has replaced these variables."""
    keys = [(optimizer, [optimizer._var_key(variable) for variable in variables]) for optimizer in _optimizers(model)]
    yield
    for optimizer, old_keys in keys:
        key_of = dict(zip(old_keys, map(optimizer._var_key, variables), strict=True))
        for name in ("_trainable_variables_indices", "_var_to_optimizer_idx"):
            if (by_key := getattr(optimizer, name, None)) is not None:
                setattr(optimizer, name, {key_of.get(key, key): value for key, value in by_key.items()})
        if hasattr(optimizer, "_exclude_from_weight_decay"):
            optimizer._exclude_from_weight_decay = {key_of.get(k, k) for k in optimizer._exclude_from_weight_decay}
            optimizer._exclude_from_weight_decay_cache = {}
    for name in _STEP_FUNCTIONS:  # traced with the replaced variables
        setattr(model, name, None)
