"""The user's batches, epoch after epoch: as arrays, or, for a Sequence, as indexes of the batches to make."""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from raykeras.core.errors import OptionError
from raykeras.data.adapters.adapter import Batches, Flat


class Epochs:
    """Iterate over epochs, each an iterator over global batches. Only one iteration at a time.

    The iteration ends with the first epoch that has no batch.

    Args:
        batches: The user's batches.
        shuffle: Whether to shuffle the batches of a Sequence in each pass.
        seed: Seed of that shuffling.
        steps: Batches in an epoch; None for a whole pass.
        restart: Whether each epoch of `steps` starts a new pass; otherwise it continues in the pass of the last one.
        skip: Number of epochs, and of batches of the next one, that are skipped because training already used them.
            A generator makes them again.

    Attributes:
        batches, seed, skip: As passed.
        is_over: Whether the last batch of a generator has been yielded; always False for the other kinds.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        shuffle: bool,
        seed: int,
        steps: int | None,
        restart: bool,
        skip: tuple[int, int] = (0, 0),
    ) -> None:
        self.is_over = False
        self.batches, self.seed, self.skip = batches, seed, skip
        self._shuffle = shuffle
        self._steps, self._restart = steps, restart

    def __iter__(self) -> Generator[Iterator[Flat]]:
        if self.batches.kind == "sequence":
            with contextlib.closing(self.indexes()) as epochs:
                yield from map(self._load, epochs)
            return
        for batches in self._skip_used(self._split(self._passes())):
            first = next(batches, None)
            if first is None and not (self._restart and self._steps):
                return
            yield self._require_steps(itertools.chain([] if first is None else [first], batches))

    def indexes(self) -> Generator[Iterator[int]]:
        """Yield the epochs of a Sequence as indexes of its batches, and call its hooks.

        `on_epoch_end` of an epoch is called when the next epoch is requested or this iterator is closed.
        """
        data = self.batches.data
        num_batches = self._steps or self.batches.num_batches
        skipped_epochs, skipped_batches = self.skip
        for number, epoch in enumerate(self._split(self._order(number) for number in itertools.count())):
            yielded: list[int] = []
            _call_hook(data, "on_epoch_begin")
            try:
                indexes = _record(epoch, yielded)
                if number < skipped_epochs:
                    collections.deque(indexes, maxlen=0)
                    continue
                collections.deque(
                    itertools.islice(indexes, skipped_batches if number == skipped_epochs else 0), maxlen=0
                )
                yield indexes
            finally:
                if len(yielded) == num_batches:
                    _call_hook(data, "on_epoch_end")

    def _skip_used(self, epochs: Iterator[Iterator[Flat]]) -> Iterator[Iterator[Flat]]:
        """Yield the epochs after the skipped ones, the first of them without its skipped batches."""
        skipped_epochs, skipped_batches = self.skip
        starts_passes = self._steps is None and self.batches.kind != "generator"
        for epoch in itertools.islice(epochs, skipped_epochs):
            if starts_passes:  # an order that changes from pass to pass may depend on how many were started
                next(epoch, None)
            else:
                collections.deque(epoch, maxlen=0)
        for epoch in epochs:
            collections.deque(itertools.islice(epoch, skipped_batches), maxlen=0)
            skipped_batches = 0
            yield epoch

    def _split(self, passes: Iterator[Iterator[Any]]) -> Iterator[Iterator[Any]]:
        """Yield epochs of `steps`, or the passes themselves."""
        if self._steps is None:
            yield from passes
        endless = _endless(passes)
        while True:
            yield itertools.islice(next(passes) if self._restart else endless, self._steps)

    def _order(self, number: int) -> Iterator[int]:
        """Return the indexes of a Sequence's batches in the order of a pass."""
        if self.batches.num_batches is None:
            return itertools.count()
        order = np.arange(self.batches.num_batches)
        if self._shuffle:
            np.random.Generator(np.random.PCG64(np.random.SeedSequence([3, self.seed, number]))).shuffle(order)
        return iter(order.tolist())

    def _load(self, indexes: Iterator[int]) -> Iterator[Flat]:
        """Yield batches of a Sequence. If its `workers` is above 1, that many threads make them ahead."""
        data, flat = self.batches.data, self.batches.flat
        workers = int(getattr(data, "workers", 1) or 1)
        if workers == 1:
            for index in indexes:
                yield flat(data[index], index)
            return
        ahead: deque[Future[Flat]] = deque()
        pool = ThreadPoolExecutor(workers)
        try:
            for index in indexes:
                ahead.append(pool.submit(lambda i: flat(data[i], i), index))
                if len(ahead) > max(workers, data.max_queue_size):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _passes(self) -> Iterator[Iterator[Flat]]:
        batches, flat = self.batches, self.batches.flat
        if batches.kind == "generator":
            # A generator may reuse its arrays.
            iterator = (flat(b, i, copy=True) for i, b in enumerate(itertools.chain(batches.taken, batches.data)))
            single_pass = self._track_end(iterator)
            while True:
                yield single_pass
        while True:
            iterator = batches.data.as_numpy_iterator() if batches.kind == "dataset" else iter(batches.data)
            yield (flat(b, i) for i, b in enumerate(iterator))

    def _track_end(self, batches: Iterator[Flat]) -> Iterator[Flat]:
        """Yield the batches, each after the next one was made, to set `is_over` with the last."""
        following = next(batches, None)
        while following is not None:
            batch, following = following, next(batches, None)
            self.is_over = following is None
            yield batch

    def _require_steps(self, batches: Iterator[Flat]) -> Iterator[Flat]:
        """Yield the batches; raise OptionError if a pass of a validation has fewer than `steps`."""
        number = 0
        for batch in batches:
            number += 1
            yield batch
        if self._restart and self._steps and number < self._steps:
            raise too_few_batches(self.batches, self._steps, number)


def too_few_batches(batches: Batches, steps: int, number: int | None) -> OptionError:
    """Return the error for a validation or evaluation that has fewer batches than steps.

    Args:
        batches: The user's batches.
        steps: Steps that were requested.
        number: Number of batches, if known.
    """
    when = "earlier" if number is None else f"after {number}"
    return OptionError(
        f"A validation or evaluation of {steps} steps needs as many batches; the {batches.type_name} ended {when}. "
        "Use fewer steps."
    )


def _call_hook(data: Any, hook: str) -> None:
    if hasattr(data, hook):
        getattr(data, hook)()


def _record(items: Iterator[Any], yielded: list[Any]) -> Iterator[Any]:
    for item in items:
        yielded.append(item)
        yield item


def _endless(passes: Iterator[Iterator[Any]]) -> Iterator[Any]:
    """Chain the passes until one of them is empty."""
    for items in passes:
        first = next(items, None)
        if first is None:
            return
        yield first
        yield from items
