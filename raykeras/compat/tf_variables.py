"""Exchange what a TensorFlow variable consists of, so that all references to the object remain valid.

A variable that is not distributed becomes a distributed one in this way, or the reverse, without a search for the
objects, closures and function arguments that refer to it. The classes of TensorFlow's variables have the same layout,
so that Python allows to assign `__class__`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

INSTANCE_NAMES = (
    "tensorflow.Variable._unique_id",
    "tensorflow.Variable.handle._distributed_container",  # of the components of a distributed variable
)
"""Attributes of instances that this module reads or sets."""


@dataclass(frozen=True)
class Contents:
    """What a variable consists of.

    Attributes:
        kind: Its class.
        attributes: The attributes of the instance.
    """

    kind: type
    attributes: dict[str, Any]


def contents_of(variable: Any) -> Contents:
    """Return the contents of a variable."""
    return Contents(type(variable), dict(vars(variable)))


def set_contents(variable: Any, contents: Contents) -> None:
    """Give a variable the contents of another one, which must not be used any more."""
    set_class(variable, contents.kind)
    object.__setattr__(variable, "__dict__", contents.attributes)
    for component in _components(variable):
        component.handle._distributed_container = weakref.ref(variable)


def set_class(variable: Any, kind: type) -> None:
    """Set the class of a variable."""
    object.__setattr__(variable, "__class__", kind)


def like(variable: Any, value: np.ndarray) -> Any:
    """Return a new variable under the current strategy, with the options of another one and its key in optimizers."""
    created = tf.Variable(
        value,
        trainable=variable.trainable,
        name=variable.name.split(":")[0],
        dtype=variable.dtype,
        constraint=variable.constraint,
        synchronization=variable.synchronization,
        aggregation=variable.aggregation,
        shape=variable.shape,
    )
    assign(created, value)  # The initial value of a sum is that of each replica.
    (*_components(created), created)[0]._unique_id = variable._unique_id
    return created


def value_of(variable: Any) -> np.ndarray:
    """Return the value of a variable, merged over its replicas if it is distributed."""
    parts = _components(variable)
    if parts and variable.aggregation == tf.VariableAggregation.NONE:  # TensorFlow cannot merge them.
        return parts[0].numpy()
    return variable.numpy()


def assign(variable: Any, value: np.ndarray) -> None:
    """Set the value of a variable, which need not be that of the current strategy."""
    on_read = variable.synchronization == tf.VariableSynchronization.ON_READ
    is_sum = on_read and variable.aggregation == tf.VariableAggregation.SUM
    for replica, part in enumerate(_components(variable) or (variable,)):
        part.assign(np.zeros_like(value) if is_sum and replica else value)


def _components(variable: Any) -> tuple[Any, ...]:
    """Return the variables of all replicas of a distributed variable; for other variables an empty tuple."""
    return tuple(getattr(variable, "values", ()))
