"""Private names of Keras 3, and the replacements of its functions that several replicas need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raykeras.compat.patch import Proxy
from raykeras.compat.versions import PrivateName

_EXACT = "give exact results on several replicas"

REDUCE_VALUES = PrivateName(
    "keras.src.losses.loss:reduce_values", _EXACT, parameters=("values", "sample_weight", "reduction")
)
REDUCE_WEIGHTED_VALUES = PrivateName(
    "keras.src.losses.loss:reduce_weighted_values",
    _EXACT,
    parameters=("values", "sample_weight", "mask", "reduction", "dtype"),
)
APPLY_MASK = PrivateName(
    "keras.src.losses.loss:apply_mask", _EXACT, parameters=("sample_weight", "mask", "dtype", "reduction")
)
SCALE_LOSS = PrivateName("keras.src.losses.loss:scale_loss_for_distribution", _EXACT, parameters=("value",))
UNSCALE_LOSS = PrivateName("keras.src.losses.loss:unscale_loss_for_distribution", _EXACT, parameters=("value",))
OUTPUT_LOSS_MODULE = PrivateName("keras.src.trainers.compile_utils:loss_module", _EXACT)
AGGREGATE_ADDITIONAL_LOSS = PrivateName("keras:Model._aggregate_additional_loss", _EXACT, parameters=("self", "loss"))
CLIP_GRADIENTS = PrivateName("keras.optimizers:Optimizer._clip_gradients", _EXACT, parameters=("self", "grads"))
REDUCE_PER_REPLICA = PrivateName(
    "keras.src.backend.tensorflow.trainer:reduce_per_replica", _EXACT, parameters=("values", "strategy", "reduction")
)
MAYBE_SYMBOLIC_BUILD = PrivateName(
    "keras:Model._maybe_symbolic_build",
    "train on several workers in spite of keras-team/keras#20585",
    parameters=("self", "iterator", "data_batch"),
)
SYMBOLIC_BUILD = PrivateName(
    "keras:Model._symbolic_build",
    "create all variables before the first step",
    parameters=("self", "iterator", "data_batch"),
)
FLATTEN_LAYERS = PrivateName(
    "keras:Layer._flatten_layers", "train a model on replicas other than those it was created for", parameters=("self",)
)
GLOBAL_ATTRIBUTE = PrivateName(
    "keras.src.backend.common.global_state:get_global_attribute",
    "save the state of `keras.random`",
    parameters=("name",),
)
H5_STORE = PrivateName(
    "keras.src.saving.saving_lib:H5IOStore",
    "copy the weights that Keras saves",
    "training waits while Keras writes the weights of a checkpoint",
    parameters=("path_or_io", "archive", "mode"),
)
FUNC_DUMP = PrivateName(
    "keras.src.utils.python_utils:func_dump", "send a compiled model with lambdas to workers", parameters=("func",)
)
FUNC_LOAD = PrivateName(
    "keras.src.utils.python_utils:func_load", "load a model with lambdas on workers", parameters=("code",)
)
INSTANCE_NAMES = ("keras.losses.SparseCategoricalCrossentropy._fn_kwargs", "keras.Sequential._functional")
"""Attributes of instances that `raykeras.compat.keras_api` reads; without them, checks that need them are skipped."""


@dataclass(frozen=True)
class LossFunctions:
    """The functions with which Keras reduces losses.

    Attributes:
        reduce_values: Reduces the values of the rows, already weighted, to a scalar.
        reduce_weighted_values: Weights values by sample weights and a mask, and reduces them.
        apply_mask: Merges a mask into sample weights.
        scale: Scales a mean over a replica's rows to the replica's part of the mean over all rows.
        unscale: Undoes `scale` for the metric of the total loss.
        unscale_output: Undoes `scale` for the metric of one output's loss.
    """

    reduce_values: Callable[..., Any]
    reduce_weighted_values: Callable[..., Any]
    apply_mask: Callable[..., Any]
    scale: Callable[[Any], Any]
    unscale: Callable[[Any], Any]
    unscale_output: Callable[[Any], Any]


@contextlib.contextmanager
def loss_functions_replaced(replacements_for: Callable[[LossFunctions], LossFunctions]) -> Iterator[None]:
    """Replace the functions with which Keras reduces losses while the block runs.

    Args:
        replacements_for: Maps Keras' functions to their replacements.
    """
    unscale = UNSCALE_LOSS.get()
    new = replacements_for(
        LossFunctions(
            reduce_values=REDUCE_VALUES.get(),
            reduce_weighted_values=REDUCE_WEIGHTED_VALUES.get(),
            apply_mask=APPLY_MASK.get(),
            scale=SCALE_LOSS.get(),
            unscale=unscale,
            unscale_output=unscale,
        )
    )
    with (
        REDUCE_VALUES.replaced(new.reduce_values),
        REDUCE_WEIGHTED_VALUES.replaced(new.reduce_weighted_values),
        APPLY_MASK.replaced(new.apply_mask),
        SCALE_LOSS.replaced(new.scale),
        UNSCALE_LOSS.replaced(new.unscale),
        OUTPUT_LOSS_MODULE.replaced(Proxy(OUTPUT_LOSS_MODULE.get(), **{UNSCALE_LOSS.attribute: new.unscale_output})),
    ):
        yield


def added_loss_replaced(
    model: Any, replacement_for: Callable[[Callable[[Any], Any]], Callable[[Any], Any]]
) -> contextlib.AbstractContextManager[None]:
    """Replace the function that reduces each loss of `add_loss` in a context.

    Args:
        model: The model.
        replacement_for: Maps the model's function to its replacement.
    """
    return AGGREGATE_ADDITIONAL_LOSS.replaced_on(model, replacement_for(AGGREGATE_ADDITIONAL_LOSS.of(model)))


def clipping_replaced(
    optimizer: Any, replacement_for: Callable[[Callable[..., Any]], Callable[[Sequence[Any]], list[Any]]]
) -> contextlib.AbstractContextManager[None]:
    """Replace the function that clips gradients in a context.

    Args:
        optimizer: The optimizer that clips them.
        replacement_for: Maps the optimizer's function to its replacement.
    """
    return CLIP_GRADIENTS.replaced_on(optimizer, replacement_for(CLIP_GRADIENTS.of(optimizer)))


def fit_without_building(model: Any) -> contextlib.AbstractContextManager[None]:
    """Keep `fit` and `evaluate` from building a model in a context; they fail to on several workers."""
    return MAYBE_SYMBOLIC_BUILD.replaced_on(model, lambda iterator=None, data_batch=None: None)


def build_symbolically(model: Any, batch: Any) -> None:
    """Create the variables of a model, its metrics and its optimizer from the shapes of a batch."""
    SYMBOLIC_BUILD.of(model)(data_batch=batch)


def reduced_logs(logs: Any, strategy: Any) -> Any:
    """Return the logs of a step, reduced over the replicas as in Keras' train function."""
    return REDUCE_PER_REPLICA.get()(logs, strategy, reduction="auto")


def shared_seed_state() -> Any | None:
    """Return the variable with the random state of `keras.random`; None if no random number was drawn from it."""
    generator = GLOBAL_ATTRIBUTE.get()("global_seed_generator")
    return None if generator is None else generator.state
