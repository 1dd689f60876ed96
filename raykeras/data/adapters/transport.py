"""Transport of the user's batches from the driver to the workers, in chunks of consecutive batches.

Ray tasks make the batches of a Sequence. A thread of the driver iterates over a tf.data dataset, a loader or a
generator, and another thread sends all batches that are ready: many small batches share a message, and no batch waits
for the next one.
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

from raykeras.core.error_context import root_cause, user_code_error
from raykeras.core.errors import RaykerasError
from raykeras.data.adapters.adapter import Batches, Flat
from raykeras.data.adapters.epochs import Epochs
from raykeras.data.plan import replica_cuts

CHUNK_NBYTES = 4 << 20
CHUNK_BATCHES = 64

_CHUNKS_AHEAD = 4
"""Chunks that may wait in each rank's channel."""

_INLINE_NBYTES = 64 << 10  # smaller chunks are faster in a message than through the object store
_TASK_S = 0.05  # target duration of a task that makes several batches
_POLL_S = 0.2
_JOIN_S = 10.0  # a thread may be in the user's code


@dataclass(frozen=True)
class BatchChunk:
    """Consecutive batches, or a rank's parts of them.

    Attributes:
        arrays: One for each tensor of the batch spec: (sum of rows, *shape).
        rows: Rows of each batch in this chunk: int64 (batches,).
        global_rows: Rows of each batch over all ranks: int64 (batches,).
        is_last: Whether this is the last chunk of a generator; always False for other data.
    """

    arrays: tuple[np.ndarray, ...]
    rows: np.ndarray
    global_rows: np.ndarray
    is_last: bool = False

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


def chunk_of(batches: Sequence[Flat], global_rows: Sequence[int], is_last: bool = False) -> BatchChunk:
    """Return a chunk of batches whose rows have the same shapes."""
    rows = np.array([len(batch[0]) for batch in batches], np.int64)
    arrays = batches[0] if len(batches) == 1 else [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    return BatchChunk(tuple(arrays), rows, np.array(global_rows, np.int64), is_last)


def chunks_for_ranks(batches: Sequence[Flat], num_ranks: int, is_last: bool = False) -> list[BatchChunk]:
    """Return a chunk for each rank of batches whose rows have the same shapes."""
    rows = [len(batch[0]) for batch in batches]
    cuts = [replica_cuts(n, num_ranks) for n in rows]
    return [
        chunk_of([[a[c[rank] : c[rank + 1]] for a in b] for b, c in zip(batches, cuts, strict=True)], rows, is_last)
        for rank in range(num_ranks)
    ]


class BatchFeeder:
    """Feed the channels of all ranks from threads of the driver.

    Reading ahead does not stop at the last epoch.

    Args:
        epochs: The batches.
        num_ranks: Number of workers.
        cpus_per_task: Logical CPUs of a task that makes batches of a Sequence.

    Attributes:
        channels: The channel of each rank.
    """

    def __init__(self, epochs: Epochs, num_ranks: int, cpus_per_task: float = 1.0) -> None:
        batches = epochs.batches
        self._epochs, self._batches, self._num_ranks = epochs, batches, num_ranks
        self._cpus_per_task = cpus_per_task
        self._stopped = threading.Event()
        self._pending: list[Any] = []
        self._number = 0
        self._buffer = _Buffer(self._stopped)
        targets = [self._submit_tasks] if batches.kind == "sequence" else [self._iterate, self._send_buffered]
        self.channels = make_channels(num_ranks, self._capacity())
        self._threads = [threading.Thread(target=target, name="raykeras-feeder", daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop the threads and close the channels."""
        self._stopped.set()
        self.channels[0].close()
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _capacity(self) -> int:
        import ray

        if self._batches.kind != "sequence":
            return _CHUNKS_AHEAD
        return max(_CHUNKS_AHEAD, 2 * int(ray.cluster_resources().get("CPU", 1)))  # tasks to keep all CPUs busy

    def _submit_tasks(self) -> None:
        """Submit the tasks that make the batches of a Sequence, and send references to their results."""
        import ray

        batches, num_ranks = self._batches, self._num_ranks
        make = ray.remote(num_cpus=self._cpus_per_task, num_returns=num_ranks)(make_chunks)
        size, metadata, sequence = batches_per_task(batches), ray.put(batches.without_data()), None
        epochs = self._epochs.indexes()
        try:
            for number, indexes in enumerate(epochs, self._epochs.skip[0]):
                if sequence is None or has_epoch_hooks(batches.data):
                    sequence = ray.put(batches.data)
                while task_indexes := list(itertools.islice(indexes, size)):
                    refs = make.remote(metadata, sequence, task_indexes, (self._epochs.seed, number), num_ranks)
                    if not self._send([[ref] for ref in (refs if num_ranks > 1 else [refs])]):
                        return
        except Exception as error:
            self._send([as_raykeras_error(error)] * num_ranks)
        finally:
            epochs.close()

    def _iterate(self) -> None:
        """Put the batches of data that can only be iterated in the driver into the buffer."""
        try:
            for batches in self._epochs:
                for batch in batches:
                    if not self._buffer.put(batch, self._epochs.is_over):
                        return
                self._buffer.put(None)
            self._buffer.end()
        except Exception as error:
            self._buffer.end(as_raykeras_error(error))

    def _send_buffered(self) -> None:
        try:
            while (buffered := self._buffer.take()) is not None:
                batches, is_last = buffered
                chunks = chunks_for_ranks(batches, self._num_ranks, is_last)
                if not self._send([chunk if chunk.nbytes < _INLINE_NBYTES else [_put(chunk)] for chunk in chunks]):
                    return
            self._send([self._buffer.failure] * self._num_ranks)
        except Exception as error:  # sent to the workers, which would otherwise wait forever
            self._send([as_raykeras_error(error)] * self._num_ranks)

    def _send(self, messages: list[Any]) -> bool:
        """Send a message to each rank, once the channels have accepted the previous ones.

        Args:
            messages: One for each rank: a chunk, a list with a reference to chunks, an exception, or None at the end.

        Returns:
            False if the feeder has been closed.
        """
        import ray

        while self._pending:
            if self._stopped.is_set():
                return False
            _, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=_POLL_S)
        if self._stopped.is_set():
            return False
        self._pending = [
            channel.put(self._number, message) for channel, message in zip(self.channels, messages, strict=True)
        ]
        self._number += 1
        return True


class _Buffer:
    """Batches that wait to be sent; limited in number and bytes, but for a single batch of any size. Thread-safe."""

    def __init__(self, stopped: threading.Event) -> None:
        self.failure: Exception | None = None
        self._stopped = stopped
        self._changed = threading.Condition()
        self._batches: deque[tuple[Flat | None, bool]] = deque()
        self._nbytes = 0
        self._ended = False

    def put(self, batch: Flat | None, is_last: bool = False) -> bool:
        """Add a batch, or None at the end of an epoch; wait for space. Return False if the feeder has been closed."""
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
        """Mark the end of the batches, with the exception that caused it, if any."""
        with self._changed:
            self.failure, self._ended = failure, True
            self._changed.notify_all()

    def take(self) -> tuple[list[Flat], bool] | None:
        """Remove and return the waiting batches that fit into one chunk; wait for the first.

        Returns:
            The batches, and whether they are the last ones; None at the end or if the feeder has been closed.
        """
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
                if batch is None or (taken and not have_same_shapes(taken[0], batch)):
                    break
                taken.append(batch)
                is_last = self._batches.popleft()[1]
                self._nbytes -= _nbytes(batch)
            self._changed.notify_all()
        return (taken, is_last) if taken else None


def make_channels(num_ranks: int, capacity: int) -> tuple[Channel, ...]:
    """Return a channel for each rank, all served by one actor, since each further process would take long to start.

    Args:
        num_ranks: Number of channels.
        capacity: Messages that may wait in each channel.
    """
    import ray

    actor = ray.remote(num_cpus=0)(_ChannelActor).remote(num_ranks, capacity)
    return tuple(Channel(actor, rank) for rank in range(num_ranks))


@dataclass(frozen=True)
class Channel:
    """A bounded queue of numbered messages to one rank; picklable."""

    actor: Any
    rank: int

    def put(self, number: int, message: Any) -> Any:
        """Send a message; return a reference that is ready once the channel has accepted it."""
        return self.actor.put.remote(self.rank, number, message)

    def get(self, number: int) -> Any:
        """Return a reference to the message of a number, which need not have been sent yet."""
        return self.actor.get.remote(self.rank, number)

    def close(self) -> None:
        """Close the channels of all ranks."""
        import ray

        ray.kill(self.actor)


class _ChannelActor:
    """The actor that serves the channels of all ranks."""

    def __init__(self, num_ranks: int, capacity: int) -> None:
        self._queues = [_MessageQueue(capacity) for _ in range(num_ranks)]

    async def put(self, rank: int, number: int, message: Any) -> None:
        await self._queues[rank].put(number, message)

    async def get(self, rank: int, number: int) -> Any:
        return await self._queues[rank].get(number)


class _MessageQueue:
    """The messages of one rank, numbered because concurrent calls of an actor are not served in order."""

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


def receive_chunks(channel: Channel) -> Iterator[BatchChunk]:
    """Yield the chunks that a rank receives, requesting each message ahead; raise an exception that was sent."""
    import ray

    requested = deque([channel.get(0), channel.get(1)])
    for number in itertools.count(2):
        message = ray.get(requested.popleft())
        if message is None:
            return
        if isinstance(message, Exception):
            raise message
        requested.append(channel.get(number))
        if isinstance(message, BatchChunk):
            yield message
        else:
            yield from ray.get(message[0])


def _make_batches(batches: Batches, sequence: Any, indexes: list[int], key: tuple[int, int]) -> list[Flat]:
    """Make batches of a Sequence, seeding `random` and `np.random` by the key and the index of each batch."""
    flat = []
    try:
        for index in indexes:
            seeds = np.random.SeedSequence([4, *key, index]).generate_state(2).tolist()
            random.seed(seeds[0])
            np.random.seed(seeds[1])
            flat.append(batches.flat(sequence[index], index))
    except Exception as error:
        raise as_raykeras_error(error) from None
    return flat


def make_chunks(batches: Batches, sequence: Any, indexes: list[int], key: tuple[int, int], num_ranks: int) -> Any:
    """Make batches of a Sequence; the function of a Ray task.

    Args:
        batches: The batches without the Sequence.
        sequence: The Sequence.
        indexes: Indexes of the batches.
        key: Seed of the run, and number of the epoch.
        num_ranks: Number of workers.

    Returns:
        A list of chunks for each rank, as the task has one return value for each rank; with one rank, its list.
    """
    waiting = deque(_make_batches(batches, sequence, indexes, key))
    ranks: list[list[BatchChunk]] = [[] for _ in range(num_ranks)]
    while waiting:
        group = [waiting.popleft()]
        while waiting and have_same_shapes(group[0], waiting[0]):
            group.append(waiting.popleft())
        for chunks, chunk in zip(ranks, chunks_for_ranks(group, num_ranks), strict=True):
            chunks.append(chunk)
    return ranks if num_ranks > 1 else ranks[0]


def batches_per_task(batches: Batches) -> int:
    """Return how many batches of a Sequence a task makes: several if they are small and fast to make."""
    by_time, by_size = _TASK_S / max(batches.batch_s, 1e-6), CHUNK_NBYTES / max(batches.batch_nbytes, 1)
    return max(1, min(CHUNK_BATCHES, int(by_time), int(by_size)))


def has_epoch_hooks(sequence: Any) -> bool:
    """Return whether a Sequence may change between epochs: whether its class overrides an epoch hook."""
    for hook in ("on_epoch_begin", "on_epoch_end"):
        for cls in type(sequence).__mro__:
            if hook in vars(cls):
                if cls.__module__.split(".")[0] not in ("keras", "tf_keras"):
                    return True
                break
    return False


def as_raykeras_error(error: Exception) -> RaykerasError:
    """Return the root cause of an exception as a `RaykerasError`: itself, or a `UserCodeError` for it."""
    cause = root_cause(error)
    return cause if isinstance(cause, RaykerasError) else user_code_error(error, None)


def have_same_shapes(one: Flat, other: Flat) -> bool:
    """Return whether the rows of two batches have the same shapes."""
    return all(a.shape[1:] == b.shape[1:] for a, b in zip(one, other, strict=True))


def _nbytes(batch: Flat | None) -> int:
    return 0 if batch is None else sum(array.nbytes for array in batch)


def _put(chunk: BatchChunk) -> Any:
    """Put a chunk into the object store; return a reference to a list of it, as from `make_chunks`."""
    import ray

    return ray.put([chunk])
