"""A rank's part of the user's own batches as a `tf.data.Dataset`.

Enters: `BatchOrders` and the rank. Leaves: elements of the same form as those of `raykeras.stream`.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from raykeras.batches import fits, other_shape, parts_of
from raykeras.columns import Tensor
from raykeras.elements import packed
from raykeras.epochs import too_few
from raykeras.iterated import as_it_is, iterated_dataset
from raykeras.keras_api import KerasAPI
from raykeras.orders import BatchOrders
from raykeras.plan import replica_cuts
from raykeras.pump import Chunk, chunk_of, received
from raykeras.stream import dtype_of

_UNKNOWN = 32  # of a dimension that differs from batch to batch; enough for a convolution
_SAMPLE_ROWS = 8
_PREFETCHED_BATCHES = 4


class BatchStream:
    """The batches of `BatchOrders`. Not thread-safe; one iteration at a time.

    Args:
        orders, rank, num_ranks: What is trained on, and whose part.
        num_replicas: Of this worker, between which its part of a batch is cut.
        num_steps: Steps over all epochs, after which no more is read; None for no end.
    """

    def __init__(
        self, orders: BatchOrders, rank: int, num_ranks: int, num_replicas: int, num_steps: int | None = None
    ) -> None:
        self.failure: Exception | None = None
        self.is_epoch_over = False  # of the first epoch, which has no more batches
        self._orders, self._batches = orders, orders.batches
        self._num_ranks, self._num_replicas = num_ranks, num_replicas
        self._num_handed, self._num_batches = orders.passed[1], -1  # how many batches there are, once it is known
        self._begun = orders.passed[1]  # batches of the first epoch that are passed over
        self._pipe = received(orders.pipes[rank]) if orders.pipes else None
        epochs = orders.epochs()
        steps = orders.steps or orders.num_steps
        num_epochs = None if num_steps is None or steps is None else -(-num_steps // steps)
        self._epochs, self._iterator = epochs, iter(epochs)
        self._own = itertools.islice(self._iterator, num_epochs)

    def close(self) -> None:
        """Calls what hooks of a Sequence are due."""
        with contextlib.suppress(ValueError):  # its iterator runs in a thread that was left behind
            self._iterator.close()

    def begin(self) -> None:
        """Nothing to do: the driver reads ahead of what it sends, and the user's own iterators begin with Keras."""

    def waited_s(self, step: int, since: float) -> float:
        """Not measured: the batches are the user's own."""
        return 0.0

    def ending_callback(self, api: KerasAPI) -> Any:
        """A callback that ends the training with the epoch in which a generator ended."""
        stream = self

        class EndingCallback(api.module.callbacks.Callback):  # type: ignore[name-defined]
            _supports_tf_logs = True
            num_steps = num_steps_here = 0  # before this epoch, in this epoch

            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                self.num_steps_here = batch + 1
                # a step without a batch would fail, but count all the same
                if self.is_over() and self.num_steps_here < (self.params["steps"] or 0):
                    self.model.stop_training = True

            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                if self.is_over() and (epoch + 1 < self.params["epochs"] or self.model.stop_training):
                    warnings.warn(
                        f"The generator came to its end after {stream._num_batches} batches, in epoch {epoch + 1} of "
                        f"{self.params['epochs']}; the training ends here.",
                        stacklevel=2,
                    )
                    self.model.stop_training = True
                self.num_steps, self.num_steps_here = self.num_steps + self.num_steps_here, 0

            def is_over(self) -> bool:
                return self.num_steps + self.num_steps_here >= stream._num_batches >= 0

        return EndingCallback()

    def endless_dataset(self) -> tf.data.Dataset:
        """Every batch, epoch after epoch. It says that it is infinite, even if it comes to an end."""
        if self._in_graph and self._orders.passed == (0, 0):
            return self._prefetched(self._from_flat(self._flat(self._batches.data.repeat())))
        return self._prefetched(self._from_chunks(self._one_epoch).repeat())

    def pass_dataset(self, num_steps: int | None) -> tf.data.Dataset:
        """The batches of one epoch; each iteration goes on to the next.

        Args:
            num_steps: Batches of each; None for all.
        """
        if self._in_graph and self._orders.passed == (0, 0):
            flat = self._flat(self._batches.data)
            if num_steps is not None:
                flat = flat.take(num_steps)
                if self._batches.num_batches is None:
                    flat = flat.concatenate(self._shortage(num_steps, flat.element_spec))
            dataset = self._from_flat(flat)
        else:
            dataset = self._from_chunks(lambda: self._one_epoch(num_steps))
        if num_steps is not None and not self._orders.passed[1]:
            dataset = dataset.repeat().take(num_steps * self._num_replicas)  # which makes the number known
        return self._prefetched(dataset)

    def ending_dataset(self, num_steps: int) -> tf.data.Dataset:
        """The batches of one pass over a dataset of the user's; where training goes on, first the rest of a pass.

        For `fit` in Keras 3, where an epoch of `num_steps` goes on in the pass of the one before, and ends with it.
        """
        flat = self._flat(self._batches.data)
        epochs, steps = self._orders.passed
        if epochs or steps:
            pass_steps = int(self._batches.data.reduce(np.int64(0), lambda number, *batch: number + 1))
            passed = epochs % -(-pass_steps // num_steps) * num_steps + steps
            self.is_epoch_over = passed == pass_steps
            skipped = [passed % pass_steps]

            @as_it_is
            def rest(_: tf.Tensor) -> tf.data.Dataset:
                return flat.skip(tf.numpy_function(lambda: np.int64(skipped.pop() if skipped else 0), [], tf.int64))

            return self._prefetched(self._from_flat(tf.data.Dataset.range(1).flat_map(rest)))
        return self._prefetched(self._from_flat(flat))

    def sample(self, num_rows: int = _SAMPLE_ROWS) -> list[tf.Tensor]:
        """Some rows of the batches' shapes and dtypes: their own, where those could be had without iterating."""
        rng, values = np.random.default_rng(0), []
        for i, tensor in enumerate(self._batches.layout.tensors):
            if self._batches.sample:
                values.append(tf.constant(self._batches.sample[i], dtype_of(tensor)))
                continue
            shape = (num_rows, *(_UNKNOWN if size is None else size for size in tensor.shape))
            dtype = dtype_of(tensor)
            if dtype == tf.string:
                values.append(tf.fill(shape, ""))
            else:
                made = rng.uniform(size=shape) if dtype.is_floating else rng.integers(0, 2, shape)
                values.append(tf.cast(made, dtype))
        return self._weighed(values)

    @property
    def _in_graph(self) -> bool:
        return self._pipe is None and self._batches.kind == "dataset"

    def _one_epoch(self, num_steps: int | None = None) -> Iterator[Chunk]:
        begun, self._begun = self._begun, 0
        if self._pipe is not None:
            chunks = _up_to(self._pipe, None if num_steps is None else num_steps - begun)
        else:
            chunks = (chunk_of([f], [len(f[0])], self._epochs.is_over) for f in next(self._own, iter(())))
        for chunk in chunks:
            self._num_handed += len(chunk.rows)
            if chunk.is_last:
                self._num_batches = self._num_handed
            yield chunk

    def _shortage(self, num_steps: int, specs: Sequence[tf.TensorSpec]) -> tf.data.Dataset:
        """A dataset that raises what is due when it is asked for a batch."""

        def elements() -> Iterator[Any]:
            self.failure = too_few(self._batches, num_steps, None)
            raise self.failure
            yield

        return iterated_dataset(elements, specs)

    def _flat(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """Tensors in the order of the layout, of a dataset of the user's."""
        tensors = self._batches.layout.tensors

        @as_it_is
        def flat(*batch: Any) -> Any:
            parts = parts_of(batch)
            return tuple(parts[tensor.role, tensor.name] for tensor in tensors)

        return dataset.map(flat)

    def _from_flat(self, flat: tf.data.Dataset) -> tf.data.Dataset:
        if self._num_replicas == self._num_ranks == 1:
            return flat.map(as_it_is(lambda *tensors: self._structured(tensors)))

        @as_it_is
        def cut(*tensors: Any) -> tf.data.Dataset:
            rows = tf.shape(tensors[0], tf.int64)[0]
            return self._elements(tensors, tf.stack(replica_cuts(rows, self._num_replicas)), rows[None])

        return flat.flat_map(cut)

    def _from_chunks(self, chunks: Callable[[], Iterator[Chunk]]) -> tf.data.Dataset:
        # of which dimensions that the model's inputs leave open may vary
        made = [tensor for tensor in self._orders.layout.tensors if tensor.role != "sample_weight"]
        known = {(tensor.role, tensor.name): tensor for tensor in made}
        tensors = [known.get((tensor.role, tensor.name), tensor) for tensor in self._batches.layout.tensors]

        def elements() -> Iterator[Any]:
            try:
                for chunk in chunks():
                    for tensor, array in zip(tensors, chunk.arrays, strict=True):
                        if not fits(array.shape[1:], tensor.shape):
                            raise other_shape(tensor, array.shape[1:], self._num_handed - 1)
                    yield *chunk.arrays, _cuts(chunk.rows, self._num_replicas), chunk.global_rows
            except Exception as error:
                self.failure = error  # of which tf.data passes on the text only
                raise

        specs = [tf.TensorSpec((None, *t.shape), dtype_of(t)) for t in tensors]
        numbers = tf.TensorSpec((None,), tf.int64)
        dataset = iterated_dataset(elements, [*specs, numbers, numbers])
        return dataset.flat_map(as_it_is(lambda *components: self._elements(components[:-2], *components[-2:])))

    def _elements(self, tensors: Sequence[tf.Tensor], cuts: tf.Tensor, global_rows: tf.Tensor) -> tf.data.Dataset:
        """One for each replica and batch."""

        @as_it_is
        def element(i: tf.Tensor) -> Any:
            batch = self._structured([tensor[cuts[i] : cuts[i + 1]] for tensor in tensors])
            if self._num_replicas == self._num_ranks == 1:
                return batch
            return packed(batch, global_rows[i // self._num_replicas])

        return tf.data.Dataset.range(tf.size(cuts, tf.int64) - 1).map(element)

    def _prefetched(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        options.deterministic = True
        return dataset.prefetch(_PREFETCHED_BATCHES * self._num_replicas).with_options(options)

    def _structured(self, tensors: Sequence[Any]) -> Any:
        """Tensors of a batch as Keras gets them."""
        return self._orders.layout.element(self._weighed(tensors))

    def _weighed(self, tensors: Sequence[Any]) -> list[Any]:
        """Tensors of a batch as those that the model takes: class weights multiplied in, missing weights one."""
        given = {(t.role, t.name): v for t, v in zip(self._batches.layout.tensors, tensors, strict=True)}
        made = []
        for tensor in self._orders.layout.tensors:
            value = given.get((tensor.role, tensor.name))
            if tensor.role == "sample_weight":
                value = given.get((tensor.role, None)) if value is None else value
                if value is None or tensor.class_weight:
                    value = _class_weighed(given["y", tensor.name], value, tensor)
            made.append(value)
        return made


def _class_weighed(y: tf.Tensor, weights: Any, tensor: Tensor) -> tf.Tensor:
    """Weights, or one, times the weights of the rows' classes; see `raykeras.columns.class_weights`."""
    rank, dtype = y.shape.rank, dtype_of(tensor)
    if rank > 1:
        y = tf.argmax(y, -1) if y.shape[-1] != 1 else y[..., 0]
    if y.dtype.is_floating:
        y = tf.round(y)
    factor = tf.ones(tf.shape(y) if tensor.class_weight else tf.shape(y)[:1], dtype)
    for label, weight in tensor.class_weight:
        factor = tf.where(tf.cast(y, tf.int64) == label, tf.constant(weight, dtype), factor)
    if weights is None:
        return factor
    both, rank = (tf.cast(weights, dtype), factor), max(weights.shape.rank, factor.shape.rank)
    return tf.multiply(*(tf.reshape(t, tf.concat([tf.shape(t), [1] * (rank - t.shape.rank)], 0)) for t in both))


def _cuts(rows: np.ndarray, num_replicas: int) -> np.ndarray:
    """Where the slices of the replicas begin and end: int64 (batches * replicas + 1,)."""
    starts = np.cumsum(rows) - rows
    slices = [starts + rows * i // num_replicas for i in range(num_replicas)]
    return np.append(np.stack(slices, 1).reshape(-1), rows.sum())  # (batches, replicas), then the end


def _up_to(chunks: Iterator[Chunk], num_batches: int | None) -> Iterator[Chunk]:
    """Chunks that hold so many batches; they end where an epoch does."""
    missing = num_batches
    while missing is None or missing > 0:
        chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk
        missing = None if missing is None else missing - len(chunk.rows)
