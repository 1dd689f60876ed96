"""The tf.distribute strategy of a worker.

Enters: how many workers and replicas there are. Leaves: a strategy (none for a single replica) and
datasets distributed under it.

    one replica                    none
    one worker, several replicas   MirroredStrategy over its GPUs, or over logical CPU devices
    several workers                MultiWorkerMirroredStrategy over all of their devices
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from raykeras.errors import OptionError, ResourceError
from raykeras.options import Scale
from raykeras.patching import Altered, replaced

# Two strategies of one process must not use the same collective keys: TensorFlow remembers the dtype of each key for
# the life of the process. Its own tests leave this much room too.
_collective_key_bases = itertools.count(100_000, 100_000)

_LEAVING_S = 1.0


def make_strategy(scale: Scale) -> tf.distribute.Strategy | None:
    """The strategy of this worker; with several workers TF_CONFIG must be set.

    Raises:
        ResourceError: If this worker sees fewer GPUs than it should use.
        OptionError: If logical CPU devices are wanted after TensorFlow has started.
    """
    if scale.gpus_per_worker:
        gpus = tf.config.list_physical_devices("GPU")
        if len(gpus) < scale.gpus_per_worker:
            raise ResourceError(
                f"A worker with `gpus_per_worker={scale.gpus_per_worker}` must see as many GPUs; TensorFlow sees "
                f"{len(gpus)}. Install `raykeras[gpu]` on the nodes, or use fewer."
            )
        for gpu in gpus:
            with contextlib.suppress(RuntimeError):  # already in use by this process
                tf.config.experimental.set_memory_growth(gpu, True)
    else:
        _rest_idle_threads()
        if scale.replicas > 1:
            _make_logical_cpus(scale.replicas)
    if scale.num_replicas == 1:
        return None
    if scale.workers == 1:
        kind = "GPU" if scale.gpus_per_worker else "CPU"
        with replaced(tf.distribute.MirroredStrategy, "_collective_key_base", next(_collective_key_bases)):
            return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(scale.replicas)])
    with _cpu_replicas(0 if scale.gpus_per_worker else scale.replicas):
        return tf.distribute.MultiWorkerMirroredStrategy()


def distribute(strategy: tf.distribute.Strategy | None, dataset: tf.data.Dataset) -> Any:
    """The dataset as `fit` takes it: each replica gets an element of it in turn, nothing is split."""
    if strategy is None:
        dataset.as_numpy_iterator = _refuse_to_iterate
        return dataset
    return strategy.distribute_datasets_from_function(lambda _: dataset)


def _refuse_to_iterate() -> Any:
    """Stands in for `as_numpy_iterator`, by which MLflow's autolog would read all data to hash it."""
    raise TypeError("raykeras reads its data once, for the training; call autolog with `log_datasets=False`")


def scope(strategy: tf.distribute.Strategy | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if strategy is None else strategy.scope()


@contextlib.contextmanager
def replicas_joined() -> Iterator[None]:
    """Lets `strategy.run` go on once the threads of its replicas have ended.

    By itself it looks whether they have, and if one is just leaving, as is often so, looks again a second later.
    """
    from tensorflow.python.distribute import mirrored_run as module

    class Coordinator(module.coordinator.Coordinator):
        def join(self, threads: Sequence[Any], *args: Any, **kwargs: Any) -> None:
            for thread in threads:
                thread.join(_LEAVING_S)
            super().join(threads, *args, **kwargs)

    with replaced(module, "coordinator", Altered(module.coordinator, Coordinator=Coordinator)):
        yield


def _rest_idle_threads() -> None:
    """Has TensorFlow's threads sleep as soon as they have nothing to do.

    By itself one of them looks for work without a pause, on a core on which rows could be read. Only TensorFlow's start
    can change that; and no configuration of the user's is touched.
    """
    from tensorflow.core.protobuf.config_pb2 import ConfigProto
    from tensorflow.python.eager.context import context

    tensorflow = context()
    if tensorflow._initialized or tensorflow._config is not None:
        return
    tensorflow._config = ConfigProto(experimental=ConfigProto.Experimental(disable_thread_spinning=True))


def _make_logical_cpus(count: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError:
        existing = len(tf.config.list_logical_devices("CPU"))
        if existing < count:
            raise OptionError(
                f"`replicas_per_worker={count}` needs as many logical CPU devices, which TensorFlow makes only when it "
                f"starts; in this process it has started, with {existing}. Pass a function that builds the model, "
                "and call `fit` before anything else uses TensorFlow."
            ) from None


@contextlib.contextmanager
def _cpu_replicas(count: int) -> Iterator[None]:
    """Lets MultiWorkerMirroredStrategy see all logical CPUs; by itself it takes the first only."""
    from tensorflow.python.distribute import collective_all_reduce_strategy as module

    def devices(_: Any, cluster_resolver: Any, worker_device: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker_device}/device:CPU:{i}" for i in range(count)), "CPU"

    if count < 2:
        yield
        return
    with replaced(module.CollectiveAllReduceExtended, "_initialize_local_devices", devices):
        yield
