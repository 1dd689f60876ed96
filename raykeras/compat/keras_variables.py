"""Find the variables of a Keras 3 model and what knows its strategy, for which Keras has no interface."""

from __future__ import annotations

from typing import Any

from raykeras.compat.keras3 import FLATTEN_LAYERS
from raykeras.compat.keras_api import KerasAPI

INSTANCE_NAMES = (
    "keras.Variable._value",
    "keras.Model._distribute_strategy",
    "keras.optimizers.AdamW._distribution_strategy",
)
"""Attributes of instances that this module reads or sets."""

_STRATEGY = "_distribute_strategy"  # of a model and of its layers that are models; None for the default strategy
_OPTIMIZER_STRATEGY = "_distribution_strategy"


def variables(model: Any) -> list[Any]:
    """Return each TensorFlow variable of a model, its optimizer, metrics and random layers once."""
    api = KerasAPI("keras")
    wrappers = [*api.variables(model), *api.metric_variables(model), *api.seed_states(model)]
    found = [getattr(wrapper, "_value", None) for wrapper in wrappers]  # None before it is created.
    return list({id(variable): variable for variable in found if variable is not None}.values())


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
        The previous strategies, each as an object, the name of an attribute and its value.
    """
    layers = [layer for layer in FLATTEN_LAYERS.of(model)() if hasattr(layer, _STRATEGY)]
    holders = [(layer, _STRATEGY, strategy) for layer in layers]
    holders += [(optimizer, _OPTIMIZER_STRATEGY, strategy or default) for optimizer in _optimizers(model)]
    previous = [(holder, name, getattr(holder, name)) for holder, name, _ in holders]
    for holder, name, value in holders:
        setattr(holder, name, value)
    return previous


def _optimizers(model: Any) -> list[Any]:
    """Return the model's optimizer and those inside it, which scale its loss or share its variables."""
    optimizers = [model.optimizer] if getattr(model, "optimizer", None) is not None else []
    for optimizer in optimizers:
        optimizers += getattr(optimizer, "optimizers", ())  # of a MultiOptimizer
        optimizers += [optimizer.inner_optimizer] if hasattr(optimizer, "inner_optimizer") else []
    return optimizers
