"""Make training on several replicas give the results of training on one.

Keras averages per-replica means, which is wrong when replicas hold different numbers of rows. Here batches come as
`(batch, number of rows of the global batch)`, and a replica's *share* is its rows divided by that number. The share
weights each loss without communication between workers where possible:

    mean over rows           multiplied by the share
    mean over valid entries  (a mask) divided by the valid entries of all replicas
    mean_with_sample_weight  divided by the weights of all replicas
    sum over rows            unchanged
    scalar from user code    a mean or a sum, as classified by `raykeras.distribute.loss_probe`

A custom `train_step`, `test_step` or `compute_loss` gets the loss of the global batch, because it passes it to metrics
and logs; the gradient is that of the replica's part.

Keras 3 needs more with several workers (keras-team/keras#20585). To infer shapes, it reduces a batch across workers;
here the model is built from the batch spec instead. It cannot reduce logs that are scalars; here they are the metrics'
results merged over all replicas, which also makes the logs of each step exact. Keras also clips gradients before it
sums them over the replicas; here they are summed first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.patch import patched_method
from raykeras.compat.tensorflow import prompt_replica_join
from raykeras.core.errors import ModelError
from raykeras.data.batch_spec import BatchSpec
from raykeras.data.elements import num_rows, unpacked
from raykeras.distribute.build import zeros
from raykeras.distribute.empty_replicas import uncounted
from raykeras.distribute.exact_keras import patch_keras
from raykeras.distribute.exact_tf_keras import patch_tf_keras
from raykeras.distribute.loss_probe import Probe, state_kept
from raykeras.distribute.weighting import ScalarLosses, current

_PATCHES = {"keras": patch_keras, "tf_keras": patch_tf_keras}


@contextlib.contextmanager
def exact(
    model: Any,
    api: KerasAPI,
    batch_spec: BatchSpec,
    strategy: tf.distribute.Strategy | None,
    sample: Sequence[Any],
    training: bool = True,
) -> Iterator[None]:
    """Keep `model.fit` and `model.evaluate` exact under a strategy while the block runs; do nothing without one.

    Args:
        model: A compiled model whose variables belong to `strategy`.
        api: The model's Keras package.
        batch_spec: Spec of the batches.
        strategy: None for a single replica.
        sample: Tensors of a few rows to probe scalar losses with, in the order of `batch_spec.tensors`.
        training: Whether the model is trained in the block, and not only evaluated.

    Raises:
        ModelError: If a loss cannot be exact on several replicas.
    """
    if strategy is None:
        yield
        return
    if not api.has_call(model):  # its losses cannot be probed
        raise _unweighted_loss()
    with contextlib.ExitStack() as stack:
        stack.enter_context(prompt_replica_join())
        with strategy.scope(), state_kept(model, strategy):
            api.build(model, zeros(batch_spec))
        losses = ScalarLosses()
        has_custom_loss = _PATCHES[api.name](stack, model, batch_spec, strategy, losses)
        with strategy.scope():
            probe = Probe(model, batch_spec.structure, strategy, _set_share, training, has_custom_loss)
            losses.scalars = probe.scalars(sample)
        uncounted(stack, model, api.module.metrics.Mean)
        for name in ("train_step", "test_step"):
            stack.enter_context(patched_method(model, name, _with_share(getattr(model, name), name)))
        yield


def building(api: KerasAPI, strategy: tf.distribute.Strategy | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a model can be built under a strategy; its layers may call losses of tf_keras."""
    return contextlib.nullcontext() if strategy is None else api.losses_in_layers()


def _set_share(share: float | None, is_raw: bool = False) -> None:
    current.share, current.is_raw = None if share is None else tf.constant(share), is_raw


def _with_share(step: Any, name: str) -> Any:
    """Return a step that takes `(batch, global_rows)` and sets this replica's share while `step(batch)` runs."""

    def share_step(data: Any) -> Any:
        batch, global_rows = unpacked(data)
        rows = tf.cast(num_rows(data[0]), tf.float32)
        current.share = tf.math.divide_no_nan(rows, tf.cast(global_rows, tf.float32))
        current.num_losses, current.num_added, current.has_weighted_loss, current.gave_global_loss = 0, 0, False, False
        try:
            result = step(batch)
        finally:
            current.share = None
        if name == "train_step" and not current.has_weighted_loss:
            raise _unweighted_loss()
        return result

    return share_step


def _unweighted_loss() -> ModelError:
    return ModelError(
        "With several replicas, a custom `train_step` must compute its loss with `self.compute_loss(x, y, y_pred, "
        "sample_weight)`, which weights it by the replica's rows; this one does not. Call it, or train on one replica."
    )
