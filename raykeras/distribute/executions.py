"""Run several steps per execution in Keras 3, and no more than the epoch has left.

Keras 3 loops over batches that it takes as optionals. TensorFlow cannot run that loop with several replicas ("You must
feed a value for placeholder tensor"), and on endless data every execution runs in full, so that an epoch continues into
the next. The loop here is passed the number of steps, as in tf_keras. Where that number is unknown, several replicas
run one step at a time, and an execution ends with the data.

Batches are taken with `IteratorGetNextSync` where possible. `next(iterator)` produces each batch in another thread and
continues in a third; where waking a thread is slow, as on a virtual machine, that takes longer than the batch. The
waiting thread is then one of those that run TensorFlow's functions, so the dataset needs threads of another pool
(`private_threadpool_size`).
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from raykeras.compat.keras3 import reduced_logs
from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.patch import patched_method
from raykeras.compat.tensorflow import has_private_threadpool, next_in_calling_thread
from raykeras.core.config import Scale

Left = Callable[[int], int]
"""Maps the largest number of steps of the next execution to the number of steps to run in it."""


def is_countable(model: Any) -> bool:
    """Return whether Keras' own functions run the steps of a Keras 3 model, not functions that its class overrides."""
    return all(KerasAPI("keras").inherits(model, f"make_{kind}_function") for kind in ("train", "test"))


@contextlib.contextmanager
def without_xla(model: Any, scale: Scale) -> Iterator[None]:
    """Disable XLA for several replicas on CPUs while the block runs; warn if the model asked for it."""
    if scale.total_replicas == 1 or scale.gpus_per_worker or getattr(model, "jit_compile", None) is not True:
        yield
        return
    warnings.warn(
        "XLA compiles the collectives of several replicas on GPUs only; got `jit_compile=True` and "
        f"{scale.total_replicas} replicas on CPUs. They run without XLA.",
        stacklevel=2,
    )
    model.jit_compile = False
    try:
        yield
    finally:
        model.jit_compile = True


def steps_left(steps_of: Callable[[int], int | None], start: tuple[int, int] = (0, 0)) -> Left:
    """Return a function that counts steps over the epochs and ends an execution where an epoch ends.

    Args:
        steps_of: Maps an epoch to its number of steps.
        start: Epoch, and number of its steps that are done.
    """
    epoch, done = start

    def next_steps(max_steps: int) -> int:
        nonlocal epoch, done
        num_steps = steps_of(epoch) or 0
        if done >= num_steps:
            epoch, done = epoch + 1, 0
            num_steps = steps_of(epoch) or 0
        num_next = min(max_steps, num_steps - done)
        done += num_next
        return num_next

    return next_steps


@contextlib.contextmanager
def counted_executions(
    model: Any, strategy: Any, *, train_left: Left | None = None, test_left: Left | None = None
) -> Iterator[None]:
    """Keep executions of a Keras 3 model from running past an epoch or a validation while the block runs.

    Args:
        model: A compiled model that `is_countable`.
        strategy: Strategy of the model, or None.
        train_left: Counts the steps of the epochs, for which the data must suffice; None if they are unknown.
        test_left: Counts the steps of evaluations; None if they are unknown.
    """
    with contextlib.ExitStack() as stack:
        if model.steps_per_execution > 1:
            for kind, left in (("train", train_left), ("test", test_left)):
                if left is not None or strategy is not None:
                    stack.enter_context(_patched_function(model, kind, left))
        yield


@contextlib.contextmanager
def _patched_function(model: Any, kind: str, left: Left | None) -> Iterator[None]:
    """Replace what `model.make_train_function()` or `make_test_function()` makes while the block runs."""
    attribute, maker = f"{kind}_function", f"make_{kind}_function"

    def make(force: bool = False) -> Any:
        if force or getattr(model, attribute) is None:
            setattr(model, attribute, _make_function(model, getattr(model, f"{kind}_step"), left))
        return getattr(model, attribute)

    setattr(model, attribute, None)
    try:
        with patched_method(model, maker, make):
            yield
    finally:
        setattr(model, attribute, None)


def _make_function(model: Any, step: Callable[[Any], Any], left: Left | None) -> Callable[[Any], Any]:
    """Return a function that runs the next steps on an iterator and returns the logs of the last one."""
    strategy = model.distribute_strategy

    @tf.autograph.experimental.do_not_convert
    def one_step(data: Any) -> Any:
        logs = strategy.run(step, args=(data,))
        return logs if strategy.num_replicas_in_sync == 1 else reduced_logs(logs, strategy)

    if not model.run_eagerly:
        one_step = tf.function(one_step, reduce_retracing=True, jit_compile=model.jit_compile)

    @tf.autograph.experimental.do_not_convert
    def execution(iterator: Any, num_steps: tf.Tensor, has_own_threads: bool) -> Any:
        get_next = next if model.run_eagerly or not has_own_threads else next_in_calling_thread
        return tf.while_loop(
            lambda i, _: i < num_steps,
            lambda i, _: (i + 1, one_step(get_next(iterator))),
            (tf.constant(1), one_step(get_next(iterator))),
            parallel_iterations=1,
        )[1]

    @tf.autograph.experimental.do_not_convert
    def next_step(iterator: Any) -> Any:
        return one_step(next(iterator))

    if not model.run_eagerly:
        execution = tf.function(execution, reduce_retracing=True)
        next_step = tf.function(next_step, reduce_retracing=True)

    known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()  # the lookup is slow

    def function(iterator: Any) -> Any:
        if not isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
            return one_step(next(iterator))  # called by `train_on_batch`
        if left is None:
            logs = next_step(iterator)
            with contextlib.suppress(StopIteration, tf.errors.OutOfRangeError):
                for _ in range(model.steps_per_execution - 1):
                    logs = next_step(iterator)
            return logs
        num_steps = left(model.steps_per_execution)
        if iterator not in known:
            known[iterator] = has_private_threadpool(iterator)
        return execution(iterator, tf.constant(num_steps), known[iterator])

    return function
