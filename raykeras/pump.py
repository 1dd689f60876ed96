"""Moves the user's own batches from the driver to the workers, through Ray's object store.

Enters: `Batches`. Leaves: for each rank its parts of them, as *chunks* of consecutive batches, epoch after epoch.

What a Sequence's `__getitem__` makes is made by Ray tasks. A tf.data dataset, a loader or a generator runs in a
thread of the driver; another sends whatever has gathered since it last sent, so that small batches travel
many at a time, and none waits for the next.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raykeras.batches import Batches, Flat
from raykeras.errors import RaykerasError, root_cause, user_code_error
from raykeras.orders import BatchOrders
from raykeras.plan import replica_cuts

CHUNK_NBYTES = 4 << 20
CHUNK_BATCHES = 64
_CHUNKS_AHEAD = 4
"""Chunks that may wait for each rank; and as many may be on their way to it."""

_INLINE_NBYTES = 64 << 10  # below, a message is faster than the object store
_TASK_S = 0.05  # for which a task makes batches, if it can make several
_POLL_S = 0.2
_JOIN_S = 10.0  # a thread may be in the user's own code


@dataclass(frozen=True)
class Chunk:
    """Consecutive batches, or a rank's parts of them.

    Attributes:
        arrays: One for each tensor of the layout, rows first.
        rows: Rows of each batch that are here: int64 (batches,).
        global_rows: Rows of each batch over all ranks: int64 (batches,).
        is_last: Whether no other follows; known of a generator.
    """

    arrays: tuple[np.ndarray, ...]
    rows: np.ndarray
    global_rows: np.ndarray
    is_last: bool = False

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


def chunk_of(batches: Sequence[Flat], global_rows: Sequence[int], is_last: bool = False) -> Chunk:
    """Batches of one shape as a chunk."""
    rows = np.array([len(batch[0]) for batch in batches], np.int64)
    arrays = batches[0] if len(batches) == 1 else [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    return Chunk(tuple(arrays), rows, np.array(global_rows, np.int64), is_last)


def chunks_for_ranks(batches: Sequence[Flat], num_ranks: int, is_last: bool = False) -> list[Chunk]:
    """Batches of one shape, cut for all ranks."""
    rows = [len(batch[0]) for batch in batches]
    cuts = [replica_cuts(n, num_ranks) for n in rows]
    return [
        chunk_of([[a[c[rank] : c[rank + 1]] for a in b] for b, c in zip(batches, cuts, strict=True)], rows, is_last)
        for rank in range(num_ranks)
    ]


class Pump:
    """Fills the pipes of all ranks from threads of the driver. It reads ahead, beyond the last epoch that is used.

    Args:
        orders: What the user passed, and from where it is used.
        num_ranks: How many workers.
        cpus_per_task: Logical CPUs of a task that makes batches of a Sequence.
    """

    def __init__(self, orders: BatchOrders, num_ranks: int, cpus_per_task: float = 1.0) -> None:
        batches = orders.batches
        self._batches, self._num_ranks, self._seed = batches, num_ranks, orders.seed
        self._cpus_per_task = cpus_per_task
        self._first_epoch = orders.passed[0]
        self._epochs = orders.epochs()
        self._stopped = threading.Event()
        self._sent: list[Any] = []
        self._number = 0
        self._gathered = _Gathered(self._stopped)
        runs = [self._make] if batches.kind == "sequence" else [self._iterate, self._send_gathered]
        self.pipes = make_pipes(num_ranks, self._capacity())
        self._threads = [threading.Thread(target=run, name="raykeras-pump", daemon=True) for run in runs]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the threads and the pipes."""
        self._stopped.set()
        self.pipes[0].close()
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _capacity(self) -> int:
        import ray

        if self._batches.kind != "sequence":
            return _CHUNKS_AHEAD
        return max(_CHUNKS_AHEAD, 2 * int(ray.cluster_resources().get("CPU", 1)))  # tasks to keep all CPUs busy

    def _make(self) -> None:
        """Has a Sequence's batches made by tasks."""
        import ray

        batches, num_ranks = self._batches, self._num_ranks
        make = ray.remote(num_cpus=self._cpus_per_task, num_returns=num_ranks)(chunks_made)
        size, known, shared = batches_per_task(batches), ray.put(batches.without_data()), None
        epochs = self._epochs.indexes()
        try:
            for number, indexes in enumerate(epochs, self._first_epoch):
                if shared is None or may_change(batches.data):
                    shared = ray.put(batches.data)
                while some := list(itertools.islice(indexes, size)):
                    refs = make.remote(known, shared, some, (self._seed, number), num_ranks)
                    if not self._send([[ref] for ref in (refs if num_ranks > 1 else [refs])]):
                        return
        except Exception as error:
            self._send([as_ours(error)] * num_ranks)
        finally:
            epochs.close()

    def _iterate(self) -> None:
        """Gathers the batches of what can only be iterated here."""
        try:
            for batches in self._epochs:
                for batch in batches:
                    if not self._gathered.put(batch, self._epochs.is_over):
                        return
                self._gathered.put(None)
            self._gathered.end()
        except Exception as error:
            self._gathered.end(as_ours(error))

    def _send_gathered(self) -> None:
        try:
            while (gathered := self._gathered.take()) is not None:
                batches, is_last = gathered
                chunks = chunks_for_ranks(batches, self._num_ranks, is_last)
                if not self._send([chunk if chunk.nbytes < _INLINE_NBYTES else [_stored(chunk)] for chunk in chunks]):
                    return
            self._send([self._gathered.failure] * self._num_ranks)
        except Exception as error:  # told to the workers, who would wait for ever
            self._send([as_ours(error)] * self._num_ranks)

    def _send(self, messages: list[Any]) -> bool:
        """Sends one message to every rank, once it has room for it; False once the pump was closed."""
        import ray

        while self._sent:
            if self._stopped.is_set():
                return False
            _, self._sent = ray.wait(self._sent, num_returns=len(self._sent), timeout=_POLL_S)
        if self._stopped.is_set():
            return False
        self._sent = [pipe.put(self._number, message) for pipe, message in zip(self.pipes, messages, strict=True)]
        self._number += 1
        return True


class _Gathered:
    """Batches that wait to be sent: some in number and size, or a single one of any size."""

    def __init__(self, stopped: threading.Event) -> None:
        self.failure: Exception | None = None
        self._stopped = stopped
        self._changed = threading.Condition()
        self._batches: deque[tuple[Flat | None, bool]] = deque()
        self._nbytes = 0
        self._ended = False

    def put(self, batch: Flat | None, is_last: bool = False) -> bool:
        """Adds a batch, or an end of an epoch; False once the pump was closed."""
        with self._changed:
            while self._nbytes >= CHUNK_NBYTES or len(self._batches) >= CHUNK_BATCHES:
                if self._stopped.is_set():
                    return False
                self._changed.wait(_POLL_S)
            self._batches.append((batch, is_last))
            self._nbytes += _nbytes(batch)
            self._changed.notify_all()
        return not self._stopped.is_set()

    def end(self, failure: Exception | None = None) -> None:
        with self._changed:
            self.failure, self._ended = failure, True
            self._changed.notify_all()

    def take(self) -> tuple[list[Flat], bool] | None:
        """All that wait and go together, at least one; None at the end, or once the pump was closed."""
        with self._changed:
            while True:
                while self._batches and self._batches[0][0] is None:
                    self._batches.popleft()
                if self._batches or self._ended or self._stopped.is_set():
                    break
                self._changed.wait(_POLL_S)
            taken: list[Flat] = []
            is_last = False
            while self._batches and not self._stopped.is_set():
                batch = self._batches[0][0]
                if batch is None or (taken and not alike(taken[0], batch)):
                    break
                taken.append(batch)
                is_last = self._batches.popleft()[1]
                self._nbytes -= _nbytes(batch)
            self._changed.notify_all()
        return (taken, is_last) if taken else None


def make_pipes(num_ranks: int, capacity: int) -> tuple[Pipe, ...]:
    """A pipe for each rank; all are of one actor, whose process would cost as much as the start of a worker's.

    Args:
        num_ranks: How many.
        capacity: Messages that may wait in each.
    """
    import ray

    actor = ray.remote(num_cpus=0)(_Mailboxes).remote(num_ranks, capacity)
    return tuple(Pipe(actor, rank) for rank in range(num_ranks))


@dataclass(frozen=True)
class Pipe:
    """Messages on their way to one rank, by number; picklable."""

    actor: Any
    rank: int

    def put(self, number: int, message: Any) -> Any:
        """Gives a reference that is there once there was room for the message."""
        return self.actor.put.remote(self.rank, number, message)

    def get(self, number: int) -> Any:
        """Gives a reference to a message."""
        return self.actor.get.remote(self.rank, number)

    def close(self) -> None:
        """Ends the pipes of all ranks."""
        import ray

        ray.kill(self.actor)


class _Mailboxes:
    """The actor of all ranks' pipes."""

    def __init__(self, num_ranks: int, capacity: int) -> None:
        self._mailboxes = [_Mailbox(capacity) for _ in range(num_ranks)]

    async def put(self, rank: int, number: int, message: Any) -> None:
        await self._mailboxes[rank].put(number, message)

    async def get(self, rank: int, number: int) -> Any:
        return await self._mailboxes[rank].get(number)


class _Mailbox:
    """One rank's messages. Numbered, since calls that wait at the same time are not served in order."""

    def __init__(self, capacity: int) -> None:
        import asyncio

        self._capacity, self._taken = capacity, 0
        self._messages: dict[int, Any] = {}
        self._changed = asyncio.Condition()

    async def put(self, number: int, message: Any) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: number < self._taken + self._capacity)
            self._messages[number] = message
            self._changed.notify_all()

    async def get(self, number: int) -> Any:
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._messages)
            self._taken = number + 1
            self._changed.notify_all()
            return self._messages.pop(number)


def received(pipe: Pipe) -> Iterator[Chunk]:
    """What the pump sends a rank; the next message is asked for before it is needed."""
    import ray

    coming = deque([pipe.get(0), pipe.get(1)])
    for number in itertools.count(2):
        message = ray.get(coming.popleft())
        if message is None:
            return
        if isinstance(message, Exception):
            raise message
        coming.append(pipe.get(number))
        if isinstance(message, Chunk):
            yield message
        else:
            yield from ray.get(message[0])


def _made(batches: Batches, sequence: Any, indexes: list[int], key: tuple[int, int]) -> list[Flat]:
    """In a task: batches of a Sequence. What they draw at random depends on the key and their number only."""
    flat = []
    try:
        for index in indexes:
            seeds = np.random.SeedSequence([4, *key, index]).generate_state(2).tolist()
            random.seed(seeds[0])
            np.random.seed(seeds[1])
            flat.append(batches.flat(sequence[index], index))
    except Exception as error:
        raise as_ours(error) from None
    return flat


def chunks_made(batches: Batches, sequence: Any, indexes: list[int], key: tuple[int, int], num_ranks: int) -> Any:
    """A task: for each rank a list of chunks; of a single rank that list."""
    waiting = deque(_made(batches, sequence, indexes, key))
    ranks: list[list[Chunk]] = [[] for _ in range(num_ranks)]
    while waiting:
        group = [waiting.popleft()]
        while waiting and alike(group[0], waiting[0]):
            group.append(waiting.popleft())
        for chunks, chunk in zip(ranks, chunks_for_ranks(group, num_ranks), strict=True):
            chunks.append(chunk)
    return ranks if num_ranks > 1 else ranks[0]


def batches_per_task(batches: Batches) -> int:
    """How many batches of a Sequence a task makes: several if they are small and soon made."""
    by_time, by_size = _TASK_S / max(batches.batch_s, 1e-6), CHUNK_NBYTES / max(batches.batch_nbytes, 1)
    return max(1, min(CHUNK_BATCHES, int(by_time), int(by_size)))


def may_change(sequence: Any) -> bool:
    """Whether it has hooks of its own, which may change it from epoch to epoch."""
    for hook in ("on_epoch_begin", "on_epoch_end"):
        for cls in type(sequence).__mro__:
            if hook in vars(cls):
                if cls.__module__.split(".")[0] not in ("keras", "tf_keras"):
                    return True
                break
    return False


def as_ours(error: Exception) -> RaykerasError:
    cause = root_cause(error)
    return cause if isinstance(cause, RaykerasError) else user_code_error(error, None)


def alike(one: Flat, other: Flat) -> bool:
    return all(a.shape[1:] == b.shape[1:] for a, b in zip(one, other, strict=True))


def _nbytes(batch: Flat | None) -> int:
    return 0 if batch is None else sum(array.nbytes for array in batch)


def _stored(chunk: Chunk) -> Any:
    import ray

    return ray.put([chunk])
