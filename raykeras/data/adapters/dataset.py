"""The user's batches for one rank as a `tf.data.Dataset`, with the elements of `raykeras.data.streaming.dataset`."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.keras_callbacks import accepting_tensors
from raykeras.data.adapters.adapter import matches_shape, parts_of, shape_error
from raykeras.data.adapters.epochs import Epochs, too_few_batches
from raykeras.data.adapters.transport import BatchChunk, Channel, chunk_of, receive_chunks
from raykeras.data.batch_spec import BatchSpec, ElementSpec
from raykeras.data.elements import packed
from raykeras.data.plan import replica_cuts
from raykeras.data.tf_dataset import dtype_of, from_iterator, no_autograph

_UNKNOWN_SIZE = 32  # of an unknown dimension in a sample; large enough for a convolution
_SAMPLE_ROWS = 8
_PREFETCHED_BATCHES = 4


class BatchStream:
    """The user's batches for one rank; a `raykeras.data.train_input.TrainInput`.

    Args:
        epochs: The batches.
        batch_spec: Spec of a batch as the model takes it.
        num_ranks: Number of workers.
        local_replicas: Replicas of this worker, which share its part of each batch.
        channel: Channel from which the rank's part of the batches is received; None to make them in this process.
        num_epochs: Epochs after which the stream ends; None for an endless stream.
    """

    def __init__(
        self,
        epochs: Epochs,
        batch_spec: BatchSpec,
        *,
        num_ranks: int,
        local_replicas: int,
        channel: Channel | None = None,
        num_epochs: int | None = None,
    ) -> None:
        self.failure: Exception | None = None
        self.is_epoch_over = False
        self._batches, self._batch_spec, self._skip = epochs.batches, batch_spec, epochs.skip
        self._num_ranks, self._local_replicas = num_ranks, local_replicas
        self._num_skipped = self._skip[1]  # batches of the first epoch
        self._num_yielded, self._num_batches = self._num_skipped, -1  # batches of a generator; -1 until it has ended
        self._channel = receive_chunks(channel) if channel else None
        self._epochs, self._iterator = epochs, iter(epochs)
        self._local_epochs = itertools.islice(self._iterator, num_epochs)

    def close(self) -> None:
        """Close the iterator, which calls the pending hooks of a Sequence."""
        with contextlib.suppress(ValueError):  # an abandoned thread is executing the iterator
            self._iterator.close()

    def begin(self) -> None:
        """Do nothing: the driver reads ahead, and an iterator of this process starts when Keras does."""

    def waited_s(self, step: int, since: float) -> float:
        """Return 0: the time that the user's code takes is not measured."""
        return 0.0

    def callbacks(self, api: KerasAPI) -> list[Any]:
        """Return a callback that stops training in the epoch in which a generator ends."""
        stream = self

        class EndingCallback(api.module.callbacks.Callback):  # type: ignore[name-defined]
            num_steps = num_steps_here = 0  # before this epoch; in this epoch

            def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
                self.num_steps_here = batch + 1
                # Another step would fail for lack of a batch, but would be counted.
                if self.is_over() and self.num_steps_here < (self.params["steps"] or 0):
                    self.model.stop_training = True

            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                if self.is_over() and (epoch + 1 < self.params["epochs"] or self.model.stop_training):
                    warnings.warn(
                        f"The generator ended after {stream._num_batches} batches, in epoch {epoch + 1} of "
                        f"{self.params['epochs']}; training stops here.",
                        stacklevel=2,
                    )
                    self.model.stop_training = True
                self.num_steps, self.num_steps_here = self.num_steps + self.num_steps_here, 0

            def is_over(self) -> bool:
                return self.num_steps + self.num_steps_here >= stream._num_batches >= 0

        return [accepting_tensors(EndingCallback())]

    def endless_dataset(self) -> tf.data.Dataset:
        """Return the batches of all epochs; the cardinality is infinite, even if the batches end."""
        if self._in_graph and self._skip == (0, 0):
            return self._prefetched(self._from_flat(self._flat(self._batches.data.repeat())))
        return self._prefetched(self._from_chunks(self._one_epoch).repeat())

    def pass_dataset(self, num_steps: int | None) -> tf.data.Dataset:
        if self._in_graph and self._skip == (0, 0):
            flat = self._flat(self._batches.data)
            if num_steps is not None:
                flat = flat.take(num_steps)
                if self._batches.num_batches is None:
                    flat = flat.concatenate(self._shortage(num_steps, flat.element_spec))
            dataset = self._from_flat(flat)
        else:
            dataset = self._from_chunks(lambda: self._one_epoch(num_steps))
        if num_steps is not None and not self._skip[1]:
            dataset = dataset.repeat().take(num_steps * self._local_replicas)  # makes the cardinality known
        return self._prefetched(dataset)

    def ending_dataset(self, num_steps: int) -> tf.data.Dataset:
        flat = self._flat(self._batches.data)
        epochs, steps = self._skip
        if epochs or steps:
            pass_steps = int(self._batches.data.reduce(np.int64(0), lambda number, *batch: number + 1))
            skip = epochs % -(-pass_steps // num_steps) * num_steps + steps
            self.is_epoch_over = skip == pass_steps
            first_skip = [skip % pass_steps]

            @no_autograph
            def rest(_: tf.Tensor) -> tf.data.Dataset:
                return flat.skip(
                    tf.numpy_function(lambda: np.int64(first_skip.pop() if first_skip else 0), [], tf.int64)
                )

            return self._prefetched(self._from_flat(tf.data.Dataset.range(1).flat_map(rest)))
        return self._prefetched(self._from_flat(flat))

    def sample(self, num_rows: int = _SAMPLE_ROWS) -> list[tf.Tensor]:
        """Return rows of the batches' shapes and dtypes: the batches' sample, if they have one, else random numbers."""
        rng, values = np.random.default_rng(0), []
        for i, tensor in enumerate(self._batches.batch_spec.tensors):
            if self._batches.sample:
                values.append(tf.constant(self._batches.sample[i], dtype_of(tensor)))
                continue
            shape = (num_rows, *(_UNKNOWN_SIZE if size is None else size for size in tensor.shape))
            dtype = dtype_of(tensor)
            if dtype == tf.string:
                values.append(tf.fill(shape, ""))
            else:
                array = rng.uniform(size=shape) if dtype.is_floating else rng.integers(0, 2, shape)
                values.append(tf.cast(array, dtype))
        return self._with_weights(values)

    @property
    def _in_graph(self) -> bool:
        return self._channel is None and self._batches.kind == "dataset"

    def _one_epoch(self, num_steps: int | None = None) -> Iterator[BatchChunk]:
        num_skipped, self._num_skipped = self._num_skipped, 0
        if self._channel is not None:
            chunks = _take_batches(self._channel, None if num_steps is None else num_steps - num_skipped)
        else:
            chunks = (chunk_of([f], [len(f[0])], self._epochs.is_over) for f in next(self._local_epochs, iter(())))
        for chunk in chunks:
            self._num_yielded += len(chunk.rows)
            if chunk.is_last:
                self._num_batches = self._num_yielded
            yield chunk

    def _shortage(self, num_steps: int, specs: Sequence[tf.TensorSpec]) -> tf.data.Dataset:
        """Return a dataset that fails when a batch is requested."""

        def elements() -> Iterator[Any]:
            self.failure = too_few_batches(self._batches, num_steps, None)
            raise self.failure
            yield

        return from_iterator(elements, specs)

    def _flat(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """Convert the user's dataset to tuples of tensors in the order of the batch spec."""
        tensors = self._batches.batch_spec.tensors

        @no_autograph
        def flat(*batch: Any) -> Any:
            parts = parts_of(batch)
            return tuple(parts[tensor.role, tensor.name] for tensor in tensors)

        return dataset.map(flat)

    def _from_flat(self, flat: tf.data.Dataset) -> tf.data.Dataset:
        if self._local_replicas == self._num_ranks == 1:
            return flat.map(no_autograph(lambda *tensors: self._element(tensors)))

        @no_autograph
        def cut(*tensors: Any) -> tf.data.Dataset:
            rows = tf.shape(tensors[0], tf.int64)[0]
            return self._elements(tensors, tf.stack(replica_cuts(rows, self._local_replicas)), rows[None])

        return flat.flat_map(cut)

    def _from_chunks(self, chunks: Callable[[], Iterator[BatchChunk]]) -> tf.data.Dataset:
        # Dimensions that the model leaves open may vary, even if they are the same in the first batches.
        model_tensors = [tensor for tensor in self._batch_spec.tensors if tensor.role != "sample_weight"]
        by_name = {(tensor.role, tensor.name): tensor for tensor in model_tensors}
        tensors = [by_name.get((tensor.role, tensor.name), tensor) for tensor in self._batches.batch_spec.tensors]

        def elements() -> Iterator[Any]:
            try:
                for chunk in chunks():
                    for tensor, array in zip(tensors, chunk.arrays, strict=True):
                        if not matches_shape(array.shape[1:], tensor.shape):
                            raise shape_error(tensor, array.shape[1:], self._num_yielded - 1)
                    yield *chunk.arrays, _cuts(chunk.rows, self._local_replicas), chunk.global_rows
            except Exception as error:
                self.failure = error
                raise

        specs = [tf.TensorSpec((None, *t.shape), dtype_of(t)) for t in tensors]
        numbers = tf.TensorSpec((None,), tf.int64)
        dataset = from_iterator(elements, [*specs, numbers, numbers])
        return dataset.flat_map(no_autograph(lambda *components: self._elements(components[:-2], *components[-2:])))

    def _elements(self, tensors: Sequence[tf.Tensor], cuts: tf.Tensor, global_rows: tf.Tensor) -> tf.data.Dataset:
        """Return a dataset with one element for each batch and replica."""

        @no_autograph
        def element(i: tf.Tensor) -> Any:
            batch = self._element([tensor[cuts[i] : cuts[i + 1]] for tensor in tensors])
            if self._local_replicas == self._num_ranks == 1:
                return batch
            return packed(batch, global_rows[i // self._local_replicas])

        return tf.data.Dataset.range(tf.size(cuts, tf.int64) - 1).map(element)

    def _prefetched(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        options.deterministic = True
        return dataset.prefetch(_PREFETCHED_BATCHES * self._local_replicas).with_options(options)

    def _element(self, tensors: Sequence[Any]) -> Any:
        """Return the tensors of a batch, nested as Keras takes them."""
        return self._batch_spec.element(self._with_weights(tensors))

    def _with_weights(self, tensors: Sequence[Any]) -> list[Any]:
        """Return the tensors that the model takes: weights include class weights; missing weights are 1."""
        by_name = {(t.role, t.name): v for t, v in zip(self._batches.batch_spec.tensors, tensors, strict=True)}
        values = []
        for tensor in self._batch_spec.tensors:
            value = by_name.get((tensor.role, tensor.name))
            if tensor.role == "sample_weight":
                value = by_name.get((tensor.role, None)) if value is None else value
                if value is None or tensor.class_weight:
                    value = _class_weighted(by_name["y", tensor.name], value, tensor)
            values.append(value)
        return values


def _class_weighted(y: tf.Tensor, weights: Any, tensor: ElementSpec) -> tf.Tensor:
    """Multiply weights, 1 if None, by the weights of the classes; see `raykeras.data.batch_spec.class_weights`."""
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


def _cuts(rows: np.ndarray, local_replicas: int) -> np.ndarray:
    """Return where the slices of the replicas begin and end: int64 (batches * replicas + 1,)."""
    starts = np.cumsum(rows) - rows
    slices = [starts + rows * i // local_replicas for i in range(local_replicas)]
    return np.append(np.stack(slices, 1).reshape(-1), rows.sum())  # (batches, replicas), then the end


def _take_batches(chunks: Iterator[BatchChunk], num_batches: int | None) -> Iterator[BatchChunk]:
    """Yield the chunks of the next `num_batches`, or all if None. No chunk continues past the end of an epoch."""
    remaining = num_batches
    while remaining is None or remaining > 0:
        chunk = next(chunks, None)
        if chunk is None:
            return
        yield chunk
        remaining = None if remaining is None else remaining - len(chunk.rows)
