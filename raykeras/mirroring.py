"""A Keras 3 model that was made elsewhere, with its variables under a strategy for a while.

The model stays the user's own object: nothing is serialised, so that any model can be trained on several replicas of
one process. Each variable of Keras holds one of TensorFlow, which is what a strategy has to make.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from raykeras.keras_api import KerasAPI
from raykeras.strategy import scope

_OF_MODELS = "_distribute_strategy"  # None for the default one
_FUNCTIONS = ("train_function", "test_function", "predict_function")


def is_made_elsewhere(model: Any, api: KerasAPI, strategy: tf.distribute.Strategy | None) -> bool:
    """Return whether the variables of a model are those of another strategy, or of none."""
    return not api.is_legacy and getattr(model, _OF_MODELS, None) is not strategy


@contextlib.contextmanager
def mirrored(model: Any, api: KerasAPI, strategy: tf.distribute.Strategy | None) -> Iterator[None]:
    """Within it the variables of a model are the strategy's; afterwards its own again, with the values they have then.

    Args:
        model: Of Keras 3, made elsewhere.
        api: Keras 3.
        strategy: None for a single replica.
    """
    own = [(variable, variable._value) for variable in _variables(model, api)]
    variables = [variable for variable, _ in own]
    before = [(holder, name, getattr(holder, name)) for holder, name in _strategies(model)]
    values = [variable.numpy() for variable in variables]
    with _found_again(model, variables), scope(strategy):
        for variable, value in zip(variables, values, strict=True):
            variable._initialize(value)
        for holder, name, _ in before:
            setattr(holder, name, strategy if name == _OF_MODELS else strategy or tf.distribute.get_strategy())
    try:
        yield
    finally:
        before_of = {id(variable): value for variable, value in own}
        variables = _variables(model, api)
        with _found_again(model, variables):
            for variable in variables:
                if (value := before_of.get(id(variable))) is None:  # it was made meanwhile
                    variable._initialize(variable.numpy())
                else:
                    value.assign(variable.numpy())
                    variable._value = value
            for holder, name, strategy_before in before:
                setattr(holder, name, strategy_before)


def _variables(model: Any, api: KerasAPI) -> list[Any]:
    """Return each variable of Keras once; TensorFlow's own stay as they are."""
    found = [*api.variables(model), *api.metric_variables(model), *api.seed_states(model)]
    return list({id(v): v for v in found if hasattr(v, "_initialize") and v._value is not None}.values())


def _optimizers(model: Any) -> list[Any]:
    """Return the optimizer of a model and those inside of it, which scale its loss or share its variables."""
    found = [model.optimizer] if getattr(model, "optimizer", None) is not None else []
    for optimizer in found:
        found += getattr(optimizer, "_inner_optimizers", ())
        found += [optimizer.inner_optimizer] if hasattr(optimizer, "inner_optimizer") else []
    return found


def _strategies(model: Any) -> Iterator[tuple[Any, str]]:
    """Yield what remembers the strategy that it was made under, and the name of the attribute."""
    for layer in model._flatten_layers():
        if hasattr(layer, _OF_MODELS):
            yield layer, _OF_MODELS
    for optimizer in _optimizers(model):
        yield optimizer, "_distribution_strategy"


@contextlib.contextmanager
def _found_again(model: Any, variables: Sequence[Any]) -> Iterator[None]:
    """Let what knows variables of Keras by those of TensorFlow know them by others that are made within it."""
    keys = [(optimizer, [optimizer._var_key(variable) for variable in variables]) for optimizer in _optimizers(model)]
    yield
    for optimizer, before in keys:
        key_of = dict(zip(before, map(optimizer._var_key, variables), strict=True))
        for name in ("_trainable_variables_indices", "_var_to_optimizer_idx"):
            if (known := getattr(optimizer, name, None)) is not None:
                setattr(optimizer, name, {key_of.get(key, key): value for key, value in known.items()})
        if hasattr(optimizer, "_exclude_from_weight_decay"):
            optimizer._exclude_from_weight_decay = {key_of.get(k, k) for k in optimizer._exclude_from_weight_decay}
            optimizer._exclude_from_weight_decay_cache = {}
    for name in _FUNCTIONS:
        setattr(model, name, None)
