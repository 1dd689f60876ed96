"""Private names of TensorFlow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.data.util import structure

from raykeras.compat.patch import Proxy, patched

_JOIN_S = 1.0


@contextlib.contextmanager
def replicas_joined() -> Iterator[None]:
    """Have `strategy.run` return as soon as its replica threads end while the block runs.

    TensorFlow polls them once per second, often just before one ends.
    """
    from tensorflow.python.distribute import mirrored_run as module

    class Coordinator(module.coordinator.Coordinator):
        def join(self, threads: Sequence[Any], *args: Any, **kwargs: Any) -> None:
            for thread in threads:
                thread.join(_JOIN_S)
            super().join(threads, *args, **kwargs)

    with patched(module, "coordinator", Proxy(module.coordinator, Coordinator=Coordinator)):
        yield


def rest_idle_threads() -> None:
    """Make idle TensorFlow threads sleep instead of busy-wait, which leaves the core for reading rows.

    This is possible only before TensorFlow's context is initialised. A configuration of the user's is left unchanged.
    """
    from tensorflow.core.protobuf.config_pb2 import ConfigProto
    from tensorflow.python.eager.context import context

    tensorflow = context()
    if tensorflow._initialized or tensorflow._config is not None:
        return
    tensorflow._config = ConfigProto(experimental=ConfigProto.Experimental(disable_thread_spinning=True))


@contextlib.contextmanager
def cpu_replicas(count: int) -> Iterator[None]:
    """Let `MultiWorkerMirroredStrategy` use `count` logical CPUs, not only the first, while the block runs."""
    from tensorflow.python.distribute import collective_all_reduce_strategy as module

    def devices(_: Any, cluster_resolver: Any, worker_device: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker_device}/device:CPU:{i}" for i in range(count)), "CPU"

    if count < 2:
        yield
        return
    with patched(module.CollectiveAllReduceExtended, "_initialize_local_devices", devices):
        yield


def has_threads_of_its_own(iterator: Any) -> bool:
    """Return whether the dataset of an iterator has a private thread pool, separate from TensorFlow's functions."""
    dataset = getattr(iterator, "_dataset", None)  # An iterator over several replicas has none.
    return dataset is not None and dataset.options().threading.private_threadpool_size is not None


def next_in_this_thread(iterator: Any) -> Any:
    """Return `next(iterator)` in a `tf.function`, computed by the calling thread.

    Args:
        iterator: A `tf.data.Iterator`.
    """
    tensors = tf.raw_ops.IteratorGetNextSync(
        iterator=iterator._iterator_resource,
        output_types=iterator._flat_output_types,
        output_shapes=iterator._flat_output_shapes,
    )
    return structure.from_compatible_tensor_list(iterator.element_spec, tensors)
