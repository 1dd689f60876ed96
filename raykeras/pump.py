"""Moves the user's own batches from the driver to the workers, through Ray's object store.

Enters: `Batches`. Leaves: for each rank a queue of its parts, pass after pass. What a Sequence's
`__getitem__` makes is made by Ray tasks; a tf.data dataset or a generator runs in the driver.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

from raykeras.batches import Batches, Part, as_tuple, cut
from raykeras.errors import RaykerasError, root_cause, user_code_error

_AHEAD = 8
"""Batches that may wait for each rank."""

_POLL_S = 0.2


class Pump:
    """Fills the queues of all ranks from a thread of the driver.

    Args:
        batches: What the user passed.
        num_ranks: How many workers.
        num_batches: Of a pass, if it is to be cut short; the next pass then begins anew.
        shuffle, seed: Of a Sequence's order.
    """

    def __init__(self, batches: Batches, num_ranks: int, num_batches: int | None, shuffle: bool, seed: int) -> None:
        from ray.util.queue import Queue

        self.pipes = tuple(Queue(maxsize=_AHEAD, actor_options={"num_cpus": 0}) for _ in range(num_ranks))
        self._batches, self._num_batches, self._shuffle, self._seed = batches, num_batches, shuffle, seed
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raykeras-pump", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and the queues."""
        self._stopped.set()
        self._thread.join()
        for pipe in self.pipes:
            pipe.shutdown(force=True)

    def _run(self) -> None:
        try:
            for number in itertools.count():
                parts = self._made(number) if self._batches.kind == "sequence" else self._iterated(number)
                for refs in itertools.islice(parts, self._num_batches):
                    if not self._send([[ref] for ref in refs]):
                        return
                if self._batches.kind == "generator":
                    return
        except Exception as error:
            cause = root_cause(error)
            failure = cause if isinstance(cause, RaykerasError) else user_code_error(cause, None)
            self._send([failure] * len(self.pipes))

    def _iterated(self, number: int) -> Iterator[list[Any]]:
        import ray

        if number == 0:
            self._passes = self._batches.passes(shuffle=self._shuffle, seed=self._seed)
        for batch in next(self._passes):
            yield [ray.put(part) for part in cut(batch, len(self.pipes))]

    def _made(self, number: int) -> Iterator[list[Any]]:
        """A pass of a Sequence, its batches made by tasks, a few ahead."""
        import ray

        sequence, num_ranks = self._batches.data, len(self.pipes)
        shared = ray.put(sequence)
        make = ray.remote(num_cpus=1, num_returns=num_ranks)(_part)
        ahead: deque[list[Any]] = deque()
        for index in self._batches.order(number, self._shuffle, self._seed):
            refs = make.remote(shared, int(index), num_ranks)
            ahead.append(refs if num_ranks > 1 else [refs])
            if len(ahead) > _AHEAD:
                yield ahead.popleft()
        yield from ahead
        if hasattr(sequence, "on_epoch_end"):
            sequence.on_epoch_end()

    def _send(self, items: list[Any]) -> bool:
        """Puts one item into every rank's queue; False once it was closed."""
        from ray.util.queue import Full

        for pipe, item in zip(self.pipes, items, strict=True):
            while True:
                if self._stopped.is_set():
                    return False
                try:
                    pipe.put(item, timeout=_POLL_S)
                    break
                except Full:
                    continue
        return True


def _part(sequence: Any, index: int, num_ranks: int) -> Any:
    parts = cut(as_tuple(sequence[index]), num_ranks)
    return parts if num_ranks > 1 else parts[0]


def received(pipe: Any) -> Iterator[Part]:
    """What the pump sends a rank."""
    import ray

    while True:
        item = pipe.get()
        if isinstance(item, Exception):
            raise item
        yield ray.get(item[0])
