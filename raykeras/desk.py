"""The one actor of a run: events on their way to the driver, and the workers' agreement where to stop.

Enters: lists of events; from each worker, how far it is. Leaves: the events, in order; the point at
which all workers stop.
"""

from __future__ import annotations

import asyncio

from raykeras.events import Event


class Desk:
    """A handle of the actor. Picklable.

    Args:
        num_ranks: How many workers there are.
    """

    def __init__(self, num_ranks: int) -> None:
        import ray

        self._actor = ray.remote(num_cpus=0)(_Desk).remote(num_ranks)

    def put(self, batch: list[Event]) -> None:
        """Takes events."""
        import ray

        ray.get(self._actor.put.remote(batch))

    def get(self, timeout_s: float) -> list[Event] | None:
        """The next events; None if none have come in time."""
        import ray

        return ray.get(self._actor.get.remote(timeout_s))

    def await_call(self) -> None:
        """Returns once a worker wants to stop."""
        import ray

        ray.get(self._actor.await_call.remote())

    def agree(self, rank: int, point: int) -> int:
        """Waits for all workers.

        Args:
            rank: Who says it.
            point: The first point at which this worker can stop.

        Returns:
            The first point at which all can.
        """
        import ray

        return int(ray.get(self._actor.agree.remote(rank, point)))

    def close(self) -> None:
        import ray

        ray.kill(self._actor)


class _Desk:
    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._events: asyncio.Queue[list[Event]] = asyncio.Queue()
        self._called, self._complete = asyncio.Event(), asyncio.Event()
        self._points: dict[int, int] = {}

    async def put(self, batch: list[Event]) -> None:
        self._events.put_nowait(batch)

    async def get(self, timeout_s: float) -> list[Event] | None:
        try:
            return await asyncio.wait_for(self._events.get(), timeout_s)
        except asyncio.TimeoutError:  # another class before Python 3.11
            return None

    async def await_call(self) -> None:
        await self._called.wait()

    async def agree(self, rank: int, point: int) -> int:
        self._called.set()
        self._points.setdefault(rank, point)
        if len(self._points) == self._num_ranks:
            self._complete.set()
        await self._complete.wait()
        return max(self._points.values())
