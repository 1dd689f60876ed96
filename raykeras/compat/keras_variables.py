"""Move the variables of a Keras 3 model to another strategy, which Keras does not provide for.

Each Keras variable wraps a TensorFlow variable, by which optimizers key what they know about it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from raykeras.compat.keras3 import FLATTEN_LAYERS
from raykeras.compat.versions import PrivateName

_PURPOSE = "train a model on replicas other than those it was created for"

INITIALIZE = PrivateName("keras:Variable._initialize", _PURPOSE, parameters=("self", "value"))
VAR_KEY = PrivateName("keras.optimizers:Optimizer._var_key", _PURPOSE, parameters=("self", "variable"))
INSTANCE_NAMES = (
    "keras.Variable._value",
    "keras.Model._distribute_strategy",
    "keras.optimizers.AdamW._distribution_strategy",
    "keras.optimizers.AdamW._trainable_variables_indices",
    "keras.optimizers.AdamW._exclude_from_weight_decay",  # after `exclude_from_weight_decay`
    "keras.optimizers.AdamW._exclude_from_weight_decay_cache",  # after `exclude_from_weight_decay`
    "keras.optimizers.MultiOptimizer._var_to_optimizer_idx",  # once it is built
)
"""Attributes of instances that this module reads or sets."""

_STRATEGY = "_distribute_strategy"  # of a model and of its layers that are models; None for the default strategy
_OPTIMIZER_STRATEGY = "_distribution_strategy"
_STEP_FUNCTIONS = ("train_function", "test_function", "predict_function")


def is_created(variable: Any) -> bool:
    """Return whether a variable is a Keras variable that wraps a TensorFlow variable."""
    return hasattr(variable, INITIALIZE.attribute) and variable._value is not None


def set_wrapped(variable: Any, value: Any) -> None:
    """Wrap a TensorFlow variable in a Keras variable, in place of the one that it wraps.

    Args:
        variable: The Keras variable.
        value: The TensorFlow variable; or an array, for a new variable under the current strategy.
    """
    INITIALIZE.of(variable)(value)


def strategy_of(model: Any) -> Any | None:
    """Return the strategy under which a model was created; None for the default strategy."""
    return getattr(model, _STRATEGY, None)


def set_strategy(model: Any, strategy: Any | None, default: Any) -> list[tuple[Any, str, Any]]:
    """Set the strategy of a model, of the models in it, and of their optimizers.

    Args:
        model: A Keras 3 model.
        strategy: The strategy, or None.
        default: The default strategy.

    Returns:
        The previous strategies, for `restore_strategies`.
    """
    layers = [layer for layer in FLATTEN_LAYERS.of(model)() if hasattr(layer, _STRATEGY)]
    holders = [(layer, _STRATEGY, strategy) for layer in layers]
    holders += [(optimizer, _OPTIMIZER_STRATEGY, strategy or default) for optimizer in _optimizers(model)]
    previous = [(holder, name, getattr(holder, name)) for holder, name, _ in holders]
    restore_strategies(holders)
    return previous


def restore_strategies(strategies: Sequence[tuple[Any, str, Any]]) -> None:
    """Set the strategies that `set_strategy` returned."""
    for holder, name, strategy in strategies:
        setattr(holder, name, strategy)


@contextlib.contextmanager
def rekeyed(model: Any, variables: Sequence[Any]) -> Iterator[None]:
    """Update what the optimizers of a model know about variables after the block has called `set_wrapped` on them."""
    keys = [(optimizer, VAR_KEY.of(optimizer)) for optimizer in _optimizers(model)]
    old_keys = [[key_of(variable) for variable in variables] for _, key_of in keys]
    yield
    for (optimizer, key_of), old in zip(keys, old_keys, strict=True):
        _rename_keys(optimizer, dict(zip(old, map(key_of, variables), strict=True)))
    for name in _STEP_FUNCTIONS:  # Traced with the replaced variables.
        setattr(model, name, None)


def _rename_keys(optimizer: Any, new_keys: dict[Any, Any]) -> None:
    for name in ("_trainable_variables_indices", "_var_to_optimizer_idx"):
        if (by_key := getattr(optimizer, name, None)) is not None:
            setattr(optimizer, name, {new_keys.get(key, key): value for key, value in by_key.items()})
    if hasattr(optimizer, "_exclude_from_weight_decay"):
        excluded = optimizer._exclude_from_weight_decay
        optimizer._exclude_from_weight_decay = {new_keys.get(key, key) for key in excluded}
        optimizer._exclude_from_weight_decay_cache = {}


def _optimizers(model: Any) -> list[Any]:
    """Return the model's optimizer and those inside it, which scale its loss or share its variables."""
    optimizers = [model.optimizer] if getattr(model, "optimizer", None) is not None else []
    for optimizer in optimizers:
        optimizers += getattr(optimizer, "optimizers", ())  # of a MultiOptimizer
        optimizers += [optimizer.inner_optimizer] if hasattr(optimizer, "inner_optimizer") else []
    return optimizers
