"""Find the variables of a tf_keras model and what knows its strategy, for which tf_keras has no interface."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow as tf

from raykeras.compat.tf_variables import set_class
from raykeras.compat.versions import PrivateName

_PURPOSE = "train a model on replicas other than those it was created for"

NODE = PrivateName("tf_keras.src.engine.node:Node", _PURPOSE)
CREATE_AUTOCAST_VARIABLE = PrivateName(
    "tf_keras.src.mixed_precision.autocast_variable:create_autocast_variable", _PURPOSE, parameters=("variable",)
)
INSTANCE_NAMES = (
    "tf_keras.Model._distribution_strategy",
    "tf_keras.optimizers.Adam._distribution_strategy",
    "tf_keras.optimizers.legacy.Adam._distribution_strategy",
    "tf_keras.layers.Dense.kernel._variable",  # in mixed precision
    "tf_keras.Input._keras_history",
)
"""Attributes of instances that this module reads or sets."""

_STRATEGY = "_distribution_strategy"  # None for the default strategy, except in optimizers that are not legacy


def variables(model: Any) -> list[Any]:
    """Return each TensorFlow variable of a model, its optimizer, losses and metrics once."""
    return [item for item in _reachable(model) if isinstance(item, tf.Variable) and not _is_wrapper(item)]


def strategy_of(model: Any) -> Any | None:
    """Return the strategy under which a model was created; None for the default strategy."""
    return getattr(model, _STRATEGY, None)


def set_strategy(model: Any, strategy: Any | None, default: Any) -> list[tuple[Any, str, Any]]:
    """Set the strategy of a model, of the models in it, and of their optimizers.

    Args:
        model: A tf_keras model whose variables already belong to the strategy.
        strategy: The strategy, or None.
        default: The default strategy.

    Returns:
        The previous strategies, each as an object, the name of an attribute and its value.
    """
    from tf_keras.optimizers import Optimizer

    previous = []
    for item in _reachable(model):
        if _is_wrapper(item):  # Its class depends on that of the variable that it wraps.
            set_class(item, type(CREATE_AUTOCAST_VARIABLE.get()(item._variable)))
        elif _STRATEGY in getattr(item, "__dict__", ()):
            previous.append((item, _STRATEGY, getattr(item, _STRATEGY)))
            setattr(item, _STRATEGY, strategy or (default if isinstance(item, Optimizer) else None))
    return previous


def _is_wrapper(item: Any) -> bool:
    """Return whether an object wraps a variable for mixed precision."""
    return isinstance(item, tf.Variable) and "_variable" in vars(item)


def _reachable(model: Any) -> list[Any]:
    """Return a model and all objects that it refers to, directly or through others, that may have variables."""
    found: dict[int, Any] = {}
    left = [model]
    while left:
        item = left.pop()
        if id(item) not in found:
            found[id(item)] = item
            left.extend(_parts(item))
    return list(found.values())


def _parts(item: Any) -> Iterable[Any]:
    """Return what an object refers to, if it is a container, a function, or an object of Keras or TensorFlow."""
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, list | tuple | set | frozenset):
        return item
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, types.FunctionType):
        # an empty cell, whose contents cannot be read, equals only another empty one
        return [cell.cell_contents for cell in item.__closure__ or () if cell != types.CellType()]
    attributes = getattr(item, "__dict__", {})
    leads_elsewhere = isinstance(item, NODE.get()) or "_keras_history" in attributes  # To layers of other models.
    if leads_elsewhere or isinstance(item, type) or not _may_have_variables(type(item)):
        return []
    return list(attributes.values())


def _may_have_variables(kind: type) -> bool:
    is_trackable = issubclass(kind, tf.__internal__.tracking.Trackable)
    return is_trackable or any(base.__module__.split(".")[0] == "tf_keras" for base in kind.__mro__)
