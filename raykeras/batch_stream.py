"""A rank's part of the user's own batches as a `tf.data.Dataset`.

Enters: `BatchOrders` and the rank. Leaves: elements of the same form as those of `raykeras.stream`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from raykeras.batches import Part
from raykeras.columns import ROLES, Tensor
from raykeras.orders import BatchOrders
from raykeras.plan import replica_cuts
from raykeras.pump import received

_UNKNOWN = 32  # of a dimension that differs from batch to batch; enough for a convolution


class BatchStream:
    """The batches of `BatchOrders`. Not thread-safe; one iteration at a time."""

    def __init__(self, orders: BatchOrders, rank: int, num_ranks: int, num_replicas: int) -> None:
        self.failure: Exception | None = None
        self._orders, self._layout = orders, orders.layout
        self._num_ranks, self._num_replicas = num_ranks, num_replicas
        if orders.pipes:
            self._parts: Iterator[Part] | None = received(orders.pipes[rank])
        else:
            self._parts = None
            assert orders.batches is not None
            self._passes = orders.batches.passes(shuffle=orders.shuffle, seed=orders.seed)

    def close(self) -> None:
        """Nothing reads ahead here."""

    def waited_s(self, step: int, since: float) -> float:
        """Not measured: the batches are the user's own."""
        return 0.0

    def endless_dataset(self) -> tf.data.Dataset:
        """Every batch, pass after pass."""
        return self._dataset(self._endless(), None).apply(
            tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
        )

    def pass_dataset(self, num_steps: int | None) -> tf.data.Dataset:
        """The batches of one pass; each iteration goes on to the next.

        Args:
            num_steps: Batches to take of each; None for all.
        """
        dataset = self._dataset(self._one_pass(num_steps), num_steps)
        if num_steps is None:
            return dataset
        return dataset.apply(tf.data.experimental.assert_cardinality(num_steps * self._num_replicas))

    def sample(self, num_rows: int = 4) -> list[tf.Tensor]:
        """Some rows of the batches' shapes and dtypes, with numbers of no meaning."""
        rng, tensors = np.random.default_rng(0), []
        for tensor in self._layout.tensors:
            shape = (num_rows, *(_UNKNOWN if size is None else size for size in tensor.shape))
            dtype = _dtype(tensor)
            made = tf.fill(shape, "") if dtype == tf.string else tf.cast(rng.uniform(size=shape), dtype)
            tensors.append(made)
        return tensors

    def _endless(self) -> tf.data.Dataset:
        batches = self._orders.batches
        if batches is not None and batches.kind == "dataset":
            return self._flat(batches.data.repeat())
        return self._generated(lambda: self._parts or self._own(itertools.chain.from_iterable(self._passes)))

    def _one_pass(self, num_steps: int | None) -> tf.data.Dataset:
        batches = self._orders.batches
        if batches is not None and batches.kind == "dataset":
            return self._flat(batches.data if num_steps is None else batches.data.take(num_steps))

        def one_pass() -> Iterator[Part]:
            parts = self._parts if self._parts is not None else self._own(next(self._passes, iter(())))
            return itertools.islice(parts, num_steps)

        return self._generated(one_pass)

    def _own(self, batches: Iterator[tuple[Any, ...]]) -> Iterator[Part]:
        for batch in batches:
            flat = self._picked(batch)
            yield tuple(batch), len(flat[0])

    def _picked(self, batch: Sequence[Any]) -> list[Any]:
        """The parts of a batch in the order of the layout."""
        picked = []
        for tensor in self._layout.tensors:
            part = batch[ROLES.index(tensor.role)]
            if tensor.name is not None:
                part = part[int(tensor.name) if tensor.role in self._layout.sequences else tensor.name]
            picked.append(part)
        return picked

    def _flat(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """(tensors in the order of the layout, rows) of a dataset of the user's."""

        def flat(*batch: Any) -> Any:
            tensors = tuple(self._picked(batch))
            return tensors, tf.cast(tf.shape(tensors[0])[0], tf.int64)

        return dataset.map(flat, num_parallel_calls=tf.data.AUTOTUNE)

    def _generated(self, parts: Callable[[], Iterator[Part]]) -> tf.data.Dataset:
        """The same of parts that are made in Python."""
        kinds = [np.dtype(object) if t.dtype == "string" else np.dtype(t.dtype) for t in self._layout.tensors]

        def elements() -> Iterator[Any]:
            try:
                for batch, rows in parts():
                    flat = zip(self._picked(batch), kinds, strict=True)
                    yield tuple(np.asarray(value).astype(kind, copy=False) for value, kind in flat), rows
            except Exception as error:
                self.failure = error
                raise

        signature = tuple(tf.TensorSpec((None, *t.shape), _dtype(t)) for t in self._layout.tensors)
        return tf.data.Dataset.from_generator(elements, output_signature=(signature, tf.TensorSpec((), tf.int64)))

    def _dataset(self, flat: tf.data.Dataset, num_steps: int | None) -> tf.data.Dataset:
        replicas = self._num_replicas

        def cut(tensors: Any, rows: tf.Tensor) -> tf.data.Dataset:
            here = tf.cast(tf.shape(tensors[0])[0], tf.int64)
            cuts = tf.stack([tf.cast(c, tf.int64) for c in replica_cuts(here, replicas)])
            parts = tf.data.Dataset.range(replicas)
            return parts.map(lambda i: (self._structured([t[cuts[i] : cuts[i + 1]] for t in tensors]), rows))

        if replicas == self._num_ranks == 1:
            dataset = flat.map(lambda tensors, rows: self._structured(list(tensors)))
        else:
            dataset = flat.flat_map(cut)
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        options.deterministic = True
        return dataset.prefetch(2 * replicas).with_options(options)

    def _structured(self, tensors: list[Any]) -> Any:
        """Keras' (x,), (x, y) or (x, y, sample_weight), class weights multiplied in."""
        batch = self._layout.structure(tensors)
        weightings = dict(self._orders.class_weight)
        if not weightings or len(batch) < 2:
            return batch
        y, weights = batch[1], batch[2] if len(batch) > 2 else None
        if not isinstance(y, dict):
            return (batch[0], y, _weighted(y, weights, next(iter(weightings.values()))))
        merged = dict(weights) if isinstance(weights, dict) else {}
        for name, value in y.items():
            shared = weights if not isinstance(weights, dict) else merged.get(name)
            merged[name] = _weighted(value, shared, weightings.get(name, ()))
        return (batch[0], y, merged)


def _weighted(y: tf.Tensor, weights: Any, weighting: Sequence[tuple[int, float]]) -> tf.Tensor:
    """Weights of rows times the weights of their classes: float32 (rows,)."""
    labels = tf.argmax(y, -1) if y.shape.rank and y.shape.rank > 1 and y.shape[-1] != 1 else tf.reshape(y, [-1])
    factor = tf.ones(tf.shape(labels), tf.float32)
    for label, weight in weighting:
        factor = tf.where(tf.cast(labels, tf.int64) == label, tf.constant(weight, tf.float32), factor)
    return factor if weights is None else factor * tf.cast(weights, tf.float32)


def _dtype(tensor: Tensor) -> tf.DType:
    return tf.string if tensor.dtype == "string" else tf.as_dtype(tensor.dtype)
