"""Create the tf.distribute strategy of a worker, and distribute datasets under it.

The strategy depends on the scale:

    one replica                    none
    one worker, several replicas   MirroredStrategy over its GPUs, or over logical CPU devices
    several workers                MultiWorkerMirroredStrategy over the devices of all workers
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
from typing import Any

import tensorflow as tf

from raykeras.compat.tensorflow import cpu_replicas, disable_thread_spinning, separate_collectives
from raykeras.core.config import Scale
from raykeras.core.errors import OptionError, ResourceError


def make_strategy(scale: Scale) -> tf.distribute.Strategy | None:
    """Return the strategy of this worker; with several workers TF_CONFIG must be set.

    Args:
        scale: Workers, GPUs and replicas of the run.

    Returns:
        None for a single replica.

    Raises:
        ResourceError: If this worker sees too few GPUs.
        OptionError: If logical CPU devices are needed after TensorFlow has been initialized.
    """
    if scale.gpus_per_worker:
        gpus = tf.config.list_physical_devices("GPU")
        if len(gpus) < scale.gpus_per_worker:
            raise ResourceError(_too_few_gpus(scale.gpus_per_worker, len(gpus)))
        for gpu in gpus:
            with contextlib.suppress(RuntimeError):  # already in use by this process
                tf.config.experimental.set_memory_growth(gpu, True)
    else:
        disable_thread_spinning()
        if scale.local_replicas > 1:
            _make_logical_cpus(scale.local_replicas)
    if scale.total_replicas == 1:
        return None
    if scale.workers == 1:
        kind = "GPU" if scale.gpus_per_worker else "CPU"
        with separate_collectives():
            return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(scale.local_replicas)])
    strategy = _strategy_of_workers(0 if scale.gpus_per_worker else scale.local_replicas)
    vars(strategy).pop("experimental_distribute_dataset", None)  # which `distribute` set for the previous job
    return strategy


@functools.cache  # a process can join a TensorFlow cluster only once
def _strategy_of_workers(num_cpu_replicas: int) -> tf.distribute.Strategy:
    with cpu_replicas(num_cpu_replicas):
        return tf.distribute.MultiWorkerMirroredStrategy()


def distribute(strategy: tf.distribute.Strategy | None, dataset: tf.data.Dataset, num_steps: int | None) -> Any:
    """Return a dataset as `fit` takes it; replicas get its elements in turn, and no element is split.

    Args:
        strategy: The strategy, or None.
        dataset: Elements for the replicas.
        num_steps: The number of steps that `fit` is told; None for a dataset of unknown length. tf_keras refuses that
            of distributed datasets, so Keras gets the dataset itself and has the strategy distribute it.
    """
    if strategy is None:
        dataset.as_numpy_iterator = _refuse_to_iterate
        return dataset
    if num_steps is None:
        distribute_others = strategy.experimental_distribute_dataset

        def distribute_dataset(given: Any, options: Any = None) -> Any:
            if given is dataset:
                return strategy.distribute_datasets_from_function(lambda _: dataset)
            return distribute_others(given, options)

        strategy.experimental_distribute_dataset = distribute_dataset
        return dataset
    return strategy.distribute_datasets_from_function(lambda _: dataset)


def scope(strategy: tf.distribute.Strategy | None) -> contextlib.AbstractContextManager[Any]:
    """Return the strategy's scope, or a null context for None."""
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def _refuse_to_iterate() -> Any:
    """Replace `as_numpy_iterator`, with which MLflow's autolog would read all data to hash it."""
    raise TypeError("raykeras reads its data only once, for training; call autolog with `log_datasets=False`")


def _too_few_gpus(requested: int, visible: int) -> str:
    """Return a message that names the most likely reason why TensorFlow sees too few GPUs on this node."""
    devices = len(glob.glob("/dev/nvidia[0-9]*"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not devices:
        remedy = "The node has no NVIDIA device: install NVIDIA's driver, and start containers with `--gpus all`."
    elif devices < requested:
        remedy = f"The node has {devices}: pass a smaller `gpus_per_worker`, and more `workers`."
    elif hidden is not None and len([name for name in hidden.split(",") if name]) < requested:
        remedy = f"The node has {devices}, but CUDA_VISIBLE_DEVICES is {hidden!r}: unset it where Ray is started."
    else:
        remedy = (
            f"The node has {devices}, so CUDA's libraries are missing or too old for the driver: install them with "
            '`pip install "raykeras[gpu]"`, and see what `python -c "import tensorflow"` prints there.'
        )
    return (
        f"A worker with `gpus_per_worker={requested}` must see that many GPUs; TensorFlow sees {visible}. {remedy} "
        "`raykeras doctor` compares all nodes."
    )


def _make_logical_cpus(count: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError:
        existing = len(tf.config.list_logical_devices("CPU"))
        if existing < count:
            raise OptionError(
                f"`replicas_per_worker={count}` needs that many logical CPU devices, which TensorFlow creates only "
                f"when it is initialized; in this process it already is, with {existing}. Pass a function that builds "
                "the model, and call `fit` before anything else uses TensorFlow."
            ) from None
