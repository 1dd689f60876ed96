"""Private names of TensorFlow."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from raykeras.compat.patch import patched
from raykeras.compat.versions import PrivateName

COLLECTIVE_KEY_BASE = PrivateName(
    "tensorflow:distribute.MirroredStrategy._collective_key_base",
    "separate the collectives of successive strategies in a process",
    "training a second time in a process may fail if its dtypes differ from those of the first",
)
LOCAL_DEVICES = PrivateName(
    "tensorflow.python.distribute.collective_all_reduce_strategy:CollectiveAllReduceExtended._initialize_local_devices",
    "run several replicas on the CPUs of each of several workers",
    parameters=("self", "cluster_resolver", "worker_device"),
)
CONTEXT = PrivateName(
    "tensorflow.python.eager.context:context",
    "make idle threads sleep",
    "idle threads of TensorFlow busy-wait",
    parameters=(),
)
INSTANCE_NAMES = (
    "tensorflow.python.eager.context.Context._config",
    "tensorflow.python.eager.context.Context._initialized",
    "tensorflow.data.Iterator._dataset",
)
"""Attributes of instances that this module reads or sets."""

_JOIN_S = 1.0

# TensorFlow remembers the dtype of each collective key for the life of the process. Its tests leave the same distance
# between strategies.
_key_bases = itertools.count(100_000, 100_000)


@contextlib.contextmanager
def prompt_replica_join() -> Iterator[None]:
    """Have `strategy.run` return as soon as its replica threads end while the block runs.

    TensorFlow polls them once per second, often just before one ends.
    """
    join = tf.train.Coordinator.join

    def prompt_join(self: Any, threads: Sequence[Any] | None = None, *args: Any, **kwargs: Any) -> None:
        for thread in threads or ():
            thread.join(_JOIN_S)
        join(self, threads, *args, **kwargs)

    with patched(tf.train.Coordinator, "join", prompt_join):
        yield


def separate_collectives() -> contextlib.AbstractContextManager[None]:
    """Return a context in which a `MirroredStrategy` gets different collective keys than earlier ones."""
    if COLLECTIVE_KEY_BASE.find() is None:
        return contextlib.nullcontext()
    return COLLECTIVE_KEY_BASE.replaced(next(_key_bases))


def disable_thread_spinning() -> None:
    """Make idle TensorFlow threads sleep instead of busy-wait, which leaves the core for reading rows.

    This is possible only before TensorFlow's context is initialised. The user's configuration is left unchanged.
    """
    get_context = CONTEXT.find()
    if get_context is None:
        return
    context, proto = get_context(), tf.compat.v1.ConfigProto
    if not getattr(context, "_initialized", True) and getattr(context, "_config", proto()) is None:
        context._config = proto(experimental=proto.Experimental(disable_thread_spinning=True))


@contextlib.contextmanager
def cpu_replicas(count: int) -> Iterator[None]:
    """Let `MultiWorkerMirroredStrategy` use `count` logical CPUs, not only the first, while the block runs."""

    def devices(_: Any, cluster_resolver: Any, worker_device: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker_device}/device:CPU:{i}" for i in range(count)), "CPU"

    if count < 2:
        yield
        return
    with LOCAL_DEVICES.replaced(devices):
        yield


def has_private_threadpool(iterator: Any) -> bool:
    """Return whether the dataset of an iterator has a private thread pool, separate from TensorFlow's functions."""
    dataset = getattr(iterator, "_dataset", None)  # An iterator over several replicas has none.
    return dataset is not None and dataset.options().threading.private_threadpool_size is not None


def next_in_calling_thread(iterator: Any) -> Any:
    """Return `next(iterator)` in a `tf.function`, computed by the calling thread if all its tensors are dense.

    Args:
        iterator: A `tf.data.Iterator`.
    """
    specs = tf.nest.flatten(iterator.element_spec)
    if not all(isinstance(spec, tf.TensorSpec) for spec in specs):
        return next(iterator)
    (resource,) = tf.nest.flatten(iterator, expand_composites=True)
    tensors = tf.raw_ops.IteratorGetNextSync(
        iterator=resource,
        output_types=[spec.dtype for spec in specs],
        output_shapes=[spec.shape for spec in specs],
    )
    return tf.nest.pack_sequence_as(iterator.element_spec, tensors)
