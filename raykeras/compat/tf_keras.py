"""Private names of tf_keras, and the replacements of its functions that several replicas need."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from raykeras.compat.patch import Proxy
from raykeras.compat.versions import PrivateName

_EXACT = "give exact results on several replicas"

GET_REDUCTION = PrivateName("tf_keras.losses:Loss._get_reduction", _EXACT, parameters=("self",))
SCALE_LOSS = PrivateName(
    "tf_keras.src.utils.losses_utils:scale_loss_for_distribution", _EXACT, parameters=("loss_value",)
)
COMPUTE_WEIGHTED_LOSS = PrivateName(
    "tf_keras.src.utils.losses_utils:compute_weighted_loss",
    _EXACT,
    parameters=("losses", "sample_weight", "reduction", "name"),
)
COMPUTE_TOTAL_LOSS = PrivateName(
    "tf_keras.src.engine.compile_utils:LossesContainer.__call__",
    _EXACT,
    parameters=("self", "y_true", "y_pred", "sample_weight", "regularization_losses"),
)
TENSORFLOW_OF_LOSSES = PrivateName("tf_keras.src.engine.compile_utils:tf", _EXACT)
REDUCE_PER_REPLICA = PrivateName(
    "tf_keras.src.engine.training:reduce_per_replica", _EXACT, parameters=("values", "strategy", "reduction")
)
FLATTEN_LAYERS = PrivateName("tf_keras:Model._flatten_layers", "save the states of random layers", parameters=("self",))
CREATE_ALL_WEIGHTS = PrivateName(
    "tf_keras.optimizers.legacy:Optimizer._create_all_weights",
    "create the variables of a legacy optimizer before the first step",
    parameters=("self", "var_list"),
)
CHECK_WEIGHTED_METRICS = PrivateName(
    "tf_keras:Model._check_sample_weight_warning",
    "warn of sample weights that no metric uses",
    "`evaluate` on several replicas does not warn",
    parameters=("self", "x", "sample_weight"),
)
H5_STORE = PrivateName(
    "tf_keras.src.saving.saving_lib:H5IOStore",
    "copy the weights that Keras saves",
    "training waits while Keras writes the weights of a checkpoint",
    parameters=("root_path", "archive", "mode"),
)
FUNC_DUMP = PrivateName(
    "tf_keras.src.utils.generic_utils:func_dump", "send a compiled model with lambdas to workers", parameters=("func",)
)
FUNC_LOAD = PrivateName(
    "tf_keras.src.utils.generic_utils:func_load", "load a model with lambdas on workers", parameters=("code",)
)
INSTANCE_NAMES = (
    "tf_keras.Model._is_compiled",
    "tf_keras.layers.Dropout._random_generator",
    "tf_keras.layers.Dropout._random_generator._generator",
    "tf_keras.losses.SparseCategoricalCrossentropy._fn_kwargs",
    "tf_keras.optimizers.Adam._built",
    "tf_keras.Model.compiled_metrics._metrics",
    "tf_keras.Model.compiled_metrics._weighted_metrics",
)
"""Attributes of instances that this module and `raykeras.compat.keras_api` read."""


@dataclass(frozen=True)
class LossFunctions:
    """The functions with which tf_keras reduces losses.

    Attributes:
        scale: Scales a mean over a replica's rows to the replica's part of the mean over all rows.
        compute_weighted_loss: Weights values by sample weights and reduces them.
        compute_total_loss: Returns the loss of a batch and updates its metrics, given the model's container of losses,
            `y_true`, `y_pred`, `sample_weight` and `regularization_losses`.
        get_strategy: Returns the strategy whose number of replicas scales a sum over rows for its metric.
    """

    scale: Callable[[Any], Any]
    compute_weighted_loss: Callable[..., Any]
    compute_total_loss: Callable[..., Any]
    get_strategy: Callable[[], Any]


@contextlib.contextmanager
def loss_functions_replaced(replacements_for: Callable[[LossFunctions], LossFunctions]) -> Iterator[None]:
    """Replace the functions with which tf_keras reduces losses while the block runs.

    Args:
        replacements_for: Maps tf_keras' functions to their replacements.
    """
    tf = TENSORFLOW_OF_LOSSES.get()
    new = replacements_for(
        LossFunctions(
            scale=SCALE_LOSS.get(),
            compute_weighted_loss=COMPUTE_WEIGHTED_LOSS.get(),
            compute_total_loss=COMPUTE_TOTAL_LOSS.get(),
            get_strategy=tf.distribute.get_strategy,
        )
    )

    def compute_total_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        return new.compute_total_loss(self, *args, **kwargs)

    with (
        SCALE_LOSS.replaced(new.scale),
        COMPUTE_WEIGHTED_LOSS.replaced(new.compute_weighted_loss),
        COMPUTE_TOTAL_LOSS.replaced(compute_total_loss),
        TENSORFLOW_OF_LOSSES.replaced(Proxy(tf, distribute=Proxy(tf.distribute, get_strategy=new.get_strategy))),
    ):
        yield


def losses_in_layers() -> contextlib.AbstractContextManager[None]:
    """Allow layers to call Keras losses under a strategy in a context; tf_keras refuses such calls."""
    from tf_keras.losses import Reduction

    def get_reduction(loss: Any) -> Any:
        return Reduction.SUM_OVER_BATCH_SIZE if loss.reduction == Reduction.AUTO else loss.reduction

    return GET_REDUCTION.replaced(get_reduction)


def check_weighted_metrics(model: Any) -> None:
    """Warn if no metric uses the sample weights of a dataset, which tf_keras cannot see in a distributed dataset."""
    if CHECK_WEIGHTED_METRICS.find() is not None:
        CHECK_WEIGHTED_METRICS.of(model)(None, True)


def build_losses_and_metrics(model: Any, y: Any, predicted: Any) -> None:
    """Create the variables of a model's losses and metrics from a batch of targets and predictions."""
    import tensorflow as tf

    if isinstance(y, dict) and not isinstance(predicted, dict):  # by output name
        y = tf.nest.pack_sequence_as(predicted, [y.get(name) for name in model.output_names])
    elif not tf.nest.is_nested(y):  # one target for all outputs
        y = tf.nest.map_structure(lambda _: y, predicted)
    with contextlib.suppress(AttributeError):  # A model with a custom `train_step` may lack these containers.
        if not model.compiled_loss.built:
            model.compiled_loss.build(predicted)
        if not model.compiled_metrics.built:
            model.compiled_metrics.build(predicted, y)
        outputs = zip(tf.nest.flatten(y), tf.nest.flatten(predicted), strict=False)
        for metrics, (true, output) in zip(_metrics_by_output(model), outputs, strict=False):
            for metric in metrics:
                # Metrics such as F1Score create their variables in `build(y_true_shape, y_pred_shape)`.
                if not metric.variables and len(inspect.signature(metric.build).parameters) == 2:
                    metric.build(true.shape, output.shape)


def _metrics_by_output(model: Any) -> Iterator[list[Any]]:
    """Yield the compiled metrics, one list per output."""
    import tensorflow as tf

    compiled = model.compiled_metrics
    for pair in zip(compiled._metrics, compiled._weighted_metrics, strict=True):
        yield [metric for metric in tf.nest.flatten(pair) if metric is not None]


def random_states(model: Any) -> list[Any]:
    """Return the variables with the states of a model's random layers, in a fixed order.

    They exist only after `tf_keras.backend.experimental.enable_tf_random_generator()`; otherwise layers use
    TensorFlow's stateful random operations, whose state cannot be read.
    """
    holders = (getattr(layer, "_random_generator", None) for layer in FLATTEN_LAYERS.of(model)())
    generators = (getattr(holder, "_generator", None) for holder in holders)
    return [generator.state for generator in generators if generator is not None]
