"""What makes several replicas give the numbers of one: each is weighed by what it holds.

Enters: a compiled model under a strategy whose batches come as `(batch, rows of the global batch)`.
Leaves: the same model, with a `train_step` and `test_step` that take such batches apart, and Keras'
losses weighed by rows instead of by one over the number of replicas.

Keras averages per-replica means, which is wrong as soon as replicas hold different numbers of rows.
Here a replica's *share* is its rows over those of the global batch, both known to the plan, so that
nothing need be asked of other workers:

    mean over rows           times the share
    mean over valid entries  (a mask) divided by the valid entries of all replicas
    mean_with_sample_weight  divided by the weights of all replicas
    sum over rows            as it is
    a scalar from user code  whichever of the two it is; see `raykeras.scalars`

A custom `train_step`, `test_step` or `compute_loss` is given the sum of the parts, since it hands it to
metrics and logs; the gradient is that of the replica's part.

Keras 3 on several workers needs two things more (keras-team/keras#20585): `_maybe_symbolic_build`,
which reduces a batch across workers to learn its shapes, and `reduce_per_replica`, which cannot
reduce scalars. The first is done here from the layout's shapes. The second returns the metrics'
results, merged over all replicas, so that the logs of each step are exact as well. And it clips
gradients before it adds those of the replicas; here they are added first.

All of it is active within `exact(...)` only, and only for the versions that it was tested with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from raykeras.columns import Layout
from raykeras.elements import unpacked
from raykeras.errors import ModelError
from raykeras.exact_keras import patch_keras
from raykeras.exact_tf_keras import losses_in_layers, patch_tf_keras
from raykeras.keras_api import KerasAPI
from raykeras.patching import replaced_method
from raykeras.scalars import ask
from raykeras.shares import ScalarLosses, current
from raykeras.strategy import replicas_joined

TESTED_KERAS = ("3.12", "3.15")
TESTED_TF_KERAS = ("2.21",)


@contextlib.contextmanager
def exact(
    model: Any,
    api: KerasAPI,
    layout: Layout,
    strategy: tf.distribute.Strategy | None,
    sample: Sequence[Any],
) -> Iterator[None]:
    """Makes `model.fit` and `model.evaluate` exact under a strategy; does nothing without one.

    Args:
        model: Compiled, under the strategy.
        api: Its Keras.
        layout: Of its data.
        strategy: None for a single replica.
        sample: A few rows, in the order of the layout's tensors, to ask losses with.

    Raises:
        ModelError: If this Keras was not tested, or a loss cannot be exact on several replicas.
    """
    if strategy is None:
        yield
        return
    tested = TESTED_TF_KERAS if api.is_legacy else TESTED_KERAS
    if not api.version.startswith(tuple(f"{v}." for v in tested)):
        raise ModelError(
            f"Several replicas need a version of {api.name} that raykeras was tested with: {', '.join(tested)}; got "
            f"{api.version}. Install `{api.name}=={tested[-1]}.*`, or train on one replica."
        )
    if not api.has_call(model):  # so that nothing can be asked of it
        raise _unweighed()
    with contextlib.ExitStack() as stack:
        stack.enter_context(replicas_joined())
        losses = ScalarLosses()
        if api.is_legacy:
            patch_tf_keras(stack, model, losses)
        else:
            patch_keras(stack, model, layout, strategy, losses)
        with strategy.scope():
            losses.scalars = ask(model, sample, layout.structure, strategy, _set_share)
        for name in ("train_step", "test_step"):
            stack.enter_context(replaced_method(model, name, _sharing(getattr(model, name), name)))
        yield


def _set_share(share: float | None) -> None:
    current.share = None if share is None else tf.constant(share)


def building(api: KerasAPI, strategy: tf.distribute.Strategy | None) -> contextlib.AbstractContextManager[Any]:
    """What the making of a model needs under a strategy; does nothing without one."""
    return losses_in_layers() if api.is_legacy and strategy is not None else contextlib.nullcontext()


def _sharing(step: Any, name: str) -> Any:
    """A step that takes the global batch's rows off its data, and knows this replica's share."""

    def share_step(data: Any) -> Any:
        batch, global_rows = unpacked(data)
        rows = tf.shape(next(x for x in tf.nest.flatten(batch) if x is not None))[0]
        current.share = tf.cast(rows, tf.float32) / tf.cast(global_rows, tf.float32)
        current.num_losses, current.num_added, current.weighed, current.whole = 0, 0, False, False
        try:
            result = step(batch)
        finally:
            current.share = None
        if name == "train_step" and not current.weighed:
            raise _unweighed()
        return result

    return share_step


def _unweighed() -> ModelError:
    return ModelError(
        "On several replicas a custom `train_step` must get its loss from `self.compute_loss(x, y, y_pred, "
        "sample_weight)`, which weighs it by the replica's rows; this one does not. Call it, or train on one replica."
    )
