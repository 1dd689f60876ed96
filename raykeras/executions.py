"""Executions of several steps at once in Keras 3, of no more steps than the epoch has left.

Enters: a model compiled with `steps_per_execution`, and how many steps an epoch and a validation have. Leaves: the same
model, with functions for `fit` and `evaluate` that make exactly these.

Keras 3 loops over batches that it gets as optionals. TensorFlow cannot run this loop with several replicas ("You must
feed a value for placeholder tensor"), and data that does not end makes whole executions, so that an epoch runs on into
the next. The loop here is tf_keras', which has neither fault: it is told how many steps to make. Where nobody knows how
many there are, several replicas make one step at a time, and an execution ends with the data.

It takes batches with `IteratorGetNextSync` where it can: `next(iterator)` has each made by another thread, and goes
on in a third. Where waking a thread is slow, as on a virtual machine, that takes longer than the batch. The thread
that waits is then one of those that run TensorFlow's functions, so that a dataset must have another one for its own
(`private_threadpool_size`).
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.data.util import structure

from raykeras.options import Scale
from raykeras.patching import replaced_method


@contextlib.contextmanager
def without_xla(model: Any, scale: Scale) -> Iterator[None]:
    """Within it several replicas on CPUs, for which XLA has no collectives, run without it; warns."""
    if scale.num_replicas == 1 or scale.gpus_per_worker or getattr(model, "jit_compile", None) is not True:
        yield
        return
    warnings.warn(
        "XLA compiles the collectives of several replicas on GPUs only; got `jit_compile=True` and "
        f"{scale.num_replicas} replicas on CPUs, which run without it.",
        stacklevel=2,
    )
    model.jit_compile = False
    try:
        yield
    finally:
        model.jit_compile = True


def is_countable(model: Any) -> bool:
    """Whether Keras' own functions run the steps of `model`, and not some that its class makes."""
    from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

    makers = ("make_train_function", "make_test_function")
    return all(getattr(type(model), maker, None) is getattr(TensorFlowTrainer, maker) for maker in makers)


Left = Callable[[int], int]
"""How many of at most so many steps to make in the next execution."""


def steps_left(steps_of: Callable[[int], int | None], begins_at: tuple[int, int] = (0, 0)) -> Left:
    """Return a function that counts the steps of epoch after epoch, and ends an execution where an epoch ends.

    Args:
        steps_of: Epoch to its steps.
        begins_at: Epoch, and steps of it that were made before.
    """
    epoch, done = begins_at

    def following(most: int) -> int:
        nonlocal epoch, done
        steps = steps_of(epoch) or 0
        if done >= steps:
            epoch, done = epoch + 1, 0
            steps = steps_of(epoch) or 0
        made = min(most, steps - done)
        done += made
        return made

    return following


@contextlib.contextmanager
def counted_executions(
    model: Any, strategy: Any, *, train_left: Left | None = None, test_left: Left | None = None
) -> Iterator[None]:
    """Makes executions of `model`, of Keras 3, end where an epoch or a validation does.

    Args:
        model: Compiled, and countable.
        strategy: That the model is trained with, or None.
        train_left: Counts the steps of the epochs, for which the data must suffice; None if they are unknown.
        test_left: Likewise those of evaluations.
    """
    with contextlib.ExitStack() as stack:
        if model.steps_per_execution > 1:
            for kind, left in (("train", train_left), ("test", test_left)):
                if left is not None or strategy is not None:
                    stack.enter_context(_replaced_function(model, kind, left))
        yield


@contextlib.contextmanager
def _replaced_function(model: Any, kind: str, left: Left | None) -> Iterator[None]:
    """Within it, `model.make_train_function()` or `make_test_function()` makes a function of ours."""
    attribute, maker = f"{kind}_function", f"make_{kind}_function"

    def make(force: bool = False) -> Any:
        if force or getattr(model, attribute) is None:
            setattr(model, attribute, _function(model, getattr(model, f"{kind}_step"), left))
        return getattr(model, attribute)

    setattr(model, attribute, None)
    try:
        with replaced_method(model, maker, make):
            yield
    finally:
        setattr(model, attribute, None)


def _function(model: Any, step: Callable[[Any], Any], left: Left | None) -> Callable[[Any], Any]:
    """A function that makes the next steps of those that an epoch has, and returns the last one's logs."""
    from keras.src.backend.tensorflow import trainer

    strategy = model.distribute_strategy

    @tf.autograph.experimental.do_not_convert
    def one_step(data: Any) -> Any:
        return trainer.reduce_per_replica(strategy.run(step, args=(data,)), strategy, reduction="auto")

    if not model.run_eagerly:
        one_step = tf.function(one_step, reduce_retracing=True, jit_compile=model.jit_compile)

    @tf.autograph.experimental.do_not_convert
    def execution(iterator: Any, steps: tf.Tensor, has_its_threads: bool) -> Any:
        following = next if model.run_eagerly or not has_its_threads else next_in_this_thread
        return tf.while_loop(
            lambda i, _: i < steps,
            lambda i, _: (i + 1, one_step(following(iterator))),
            (tf.constant(1), one_step(following(iterator))),
            parallel_iterations=1,
        )[1]

    @tf.autograph.experimental.do_not_convert
    def next_step(iterator: Any) -> Any:
        return one_step(next(iterator))

    if not model.run_eagerly:
        execution = tf.function(execution, reduce_retracing=True)
        next_step = tf.function(next_step, reduce_retracing=True)

    known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()  # asking takes 0.2 ms

    def function(iterator: Any) -> Any:
        if not isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
            return one_step(next(iterator))  # of `train_on_batch`
        if left is None:
            logs = next_step(iterator)
            with contextlib.suppress(StopIteration, tf.errors.OutOfRangeError):
                for _ in range(model.steps_per_execution - 1):
                    logs = next_step(iterator)
            return logs
        steps = left(model.steps_per_execution)
        if iterator not in known:
            known[iterator] = has_threads_of_its_own(iterator)
        return execution(iterator, tf.constant(steps), known[iterator])

    return function


def has_threads_of_its_own(iterator: Any) -> bool:
    """Whether the dataset of an iterator needs none of the threads that run TensorFlow's functions."""
    dataset = getattr(iterator, "_dataset", None)  # of one over several replicas there is none
    return dataset is not None and dataset.options().threading.private_threadpool_size is not None


def next_in_this_thread(iterator: Any) -> Any:
    """`next(iterator)` of a `tf.data.Iterator` in a `tf.function`, made by the thread that asks for it."""
    tensors = tf.raw_ops.IteratorGetNextSync(
        iterator=iterator._iterator_resource,
        output_types=iterator._flat_output_types,
        output_shapes=iterator._flat_output_shapes,
    )
    return structure.from_compatible_tensor_list(iterator.element_spec, tensors)
