"""The batches that the user makes, epoch after epoch.

Enters: `Batches`. Leaves: global batches as arrays in the order of their layout; or, of a Sequence, the numbers
of its batches, for whoever makes them.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from raykeras.batches import Batches, Flat
from raykeras.errors import OptionError


class Epochs:
    """The batches of one epoch after the other; an epoch without a batch is the end. One iteration at a time.

    Args:
        batches: What the user passed.
        shuffle, seed: Of a Sequence's order.
        steps: Batches of an epoch; None for a whole pass.
        restart: Whether an epoch of `steps` begins a pass anew; else it goes on where the last one stopped.
        passed: Epochs, and batches of the next, that were used before and are passed over. Of what is the same in
            every pass only their number counts; a generator has to make them again.

    Attributes:
        is_over: Whether the batch that was handed last is the last of all; known of a generator.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        shuffle: bool,
        seed: int,
        steps: int | None,
        restart: bool,
        passed: tuple[int, int] = (0, 0),
    ) -> None:
        self.is_over = False
        self._passed = passed
        self._batches, self._shuffle, self._seed = batches, shuffle, seed
        self._steps, self._restart = steps, restart

    def __iter__(self) -> Generator[Iterator[Flat]]:
        if self._batches.kind == "sequence":
            with contextlib.closing(self.indexes()) as epochs:
                yield from map(self._made, epochs)
            return
        for batches in self._going_on(self._stretches(self._passes())):
            first = next(batches, None)
            if first is None and not (self._restart and self._steps):
                return
            yield self._enough(itertools.chain([] if first is None else [first], batches))

    def indexes(self) -> Generator[Iterator[int]]:
        """The epochs of a Sequence as numbers of its batches. Its hooks are called around each.

        At the end of an epoch the hook is called when the next one is asked for, or this iterator is closed.
        """
        data = self._batches.data
        wanted = self._steps or self._batches.num_batches
        epochs, batches = self._passed
        for number, stretch in enumerate(self._stretches(self._order(number) for number in itertools.count())):
            handed: list[int] = []
            _call(data, "on_epoch_begin")
            try:
                indexes = _noted(stretch, handed)
                if number < epochs:
                    collections.deque(indexes, maxlen=0)
                    continue
                collections.deque(itertools.islice(indexes, batches if number == epochs else 0), maxlen=0)
                yield indexes
            finally:
                if len(handed) == wanted:
                    _call(data, "on_epoch_end")

    def _going_on(self, epochs: Iterator[Iterator[Flat]]) -> Iterator[Iterator[Flat]]:
        """The epochs after those that were passed; of the first of them the rest."""
        number, batches = self._passed
        every_pass = self._steps is None and self._batches.kind != "generator"
        for epoch in itertools.islice(epochs, number):
            if every_pass:  # begun, as an order that changes from pass to pass may depend on that
                next(epoch, None)
            else:
                collections.deque(epoch, maxlen=0)
        for epoch in epochs:
            collections.deque(itertools.islice(epoch, batches), maxlen=0)
            batches = 0
            yield epoch

    def _stretches(self, passes: Iterator[Iterator[Any]]) -> Iterator[Iterator[Any]]:
        if self._steps is None:
            yield from passes
        endless = _endless(passes)
        while True:
            yield itertools.islice(next(passes) if self._restart else endless, self._steps)

    def _order(self, number: int) -> Iterator[int]:
        """The numbers of a Sequence's batches in the order of a pass."""
        if self._batches.num_batches is None:
            return itertools.count()
        order = np.arange(self._batches.num_batches)
        if self._shuffle:
            np.random.Generator(np.random.PCG64(np.random.SeedSequence([3, self._seed, number]))).shuffle(order)
        return iter(order.tolist())

    def _made(self, indexes: Iterator[int]) -> Iterator[Flat]:
        """Batches of a Sequence; made by threads, a few ahead, if it asks for several workers."""
        data, flat = self._batches.data, self._batches.flat
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
        batches, flat = self._batches, self._batches.flat
        if batches.kind == "generator":
            # copies, since a generator may use its arrays again
            made = (flat(b, i, copy=True) for i, b in enumerate(itertools.chain(batches.taken, batches.data)))
            once = self._until_over(made)
            while True:
                yield once
        while True:
            made = batches.data.as_numpy_iterator() if batches.kind == "dataset" else iter(batches.data)
            yield (flat(b, i) for i, b in enumerate(made))

    def _until_over(self, made: Iterator[Flat]) -> Iterator[Flat]:
        held = next(made, None)
        while held is not None:
            batch, held = held, next(made, None)
            self.is_over = held is None
            yield batch

    def _enough(self, batches: Iterator[Flat]) -> Iterator[Flat]:
        number = 0
        for batch in batches:
            number += 1
            yield batch
        if self._restart and self._steps and number < self._steps:
            raise too_few(self._batches, self._steps, number)


def too_few(batches: Batches, steps: int, number: int | None) -> OptionError:
    """What is raised where a validation has fewer batches than steps."""
    after = "before" if number is None else f"after {number}"
    return OptionError(
        f"A validation or evaluation of {steps} steps needs as many batches; the {batches.described} came to its end "
        f"{after}. Ask for fewer steps."
    )


def _call(data: Any, hook: str) -> None:
    if hasattr(data, hook):
        getattr(data, hook)()


def _noted(items: Iterator[Any], handed: list[Any]) -> Iterator[Any]:
    for item in items:
        handed.append(item)
        yield item


def _endless(passes: Iterator[Iterator[Any]]) -> Iterator[Any]:
    """Pass after pass, until one has nothing."""
    for items in passes:
        first = next(items, None)
        if first is None:
            return
        yield first
        yield from items
