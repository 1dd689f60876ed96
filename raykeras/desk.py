"""The one actor of a run: events on their way to the driver, the workers' agreements, and what they last said.

Enters: lists of events; from each worker, where it is and how far. Leaves: the events, in order; the point at
which all workers do a thing; and, once a worker is gone, its node and what it found wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Literal

from raykeras.events import Event

Wish = Literal["save", "stop", "leave"]
"""What is done at a point: a checkpoint; what `model.stop_training` means; a checkpoint, and no more."""

_STRENGTH: Mapping[Wish | None, int] = {None: 0, "save": 1, "stop": 2, "leave": 3}


def stronger(one: Wish | None, other: Wish | None) -> Wish | None:
    return one if _STRENGTH[one] >= _STRENGTH[other] else other


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

    def get(self) -> list[Event] | None:
        """Waits for the next events; None at their end."""
        import ray

        return ray.get(self._actor.get.remote())

    def end(self) -> None:
        """No events come any more."""
        import ray

        ray.get(self._actor.put.remote(None))

    def note(self, rank: int, **facts: str) -> None:
        """Keeps facts of a worker: its node, what is wrong with it."""
        import ray

        ray.get(self._actor.note.remote(rank, facts))

    def notes(self) -> dict[int, dict[str, str]]:
        """The facts of all workers, by rank."""
        import ray

        return dict(ray.get(self._actor.notes.remote()))

    def call(self, wish: Wish) -> None:
        """Wants something of all workers, from outside."""
        import ray

        ray.get(self._actor.call.remote(wish))

    def await_call(self, meeting: int) -> None:
        """Returns once somebody called a meeting."""
        import ray

        ray.get(self._actor.await_call.remote(meeting))

    def agree(self, meeting: int, rank: int, point: int, wish: Wish | None) -> tuple[int, Wish]:
        """Waits for all workers.

        Args:
            meeting: Its number, from 0.
            rank: Who says it.
            point: The first point at which this worker can do it.
            wish: What this worker wants.

        Returns:
            The first point at which all can, and the strongest of the wishes.
        """
        import ray

        return tuple(ray.get(self._actor.agree.remote(meeting, rank, point, wish)))

    def close(self) -> None:
        import ray

        ray.kill(self._actor)


class _Desk:
    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._events: asyncio.Queue[list[Event] | None] = asyncio.Queue()
        self._meetings: list[_Meeting] = []
        self._notes: dict[int, dict[str, str]] = {}

    async def note(self, rank: int, facts: dict[str, str]) -> None:
        self._notes.setdefault(rank, {}).update(facts)

    async def notes(self) -> dict[int, dict[str, str]]:
        return self._notes

    async def put(self, batch: list[Event] | None) -> None:
        self._events.put_nowait(batch)

    async def get(self) -> list[Event] | None:
        return await self._events.get()

    def _meeting(self, number: int) -> _Meeting:
        while len(self._meetings) <= number:
            self._meetings.append(_Meeting())
        return self._meetings[number]

    async def call(self, wish: Wish) -> None:
        over = sum(meeting.is_complete.is_set() for meeting in self._meetings)
        self._meeting(over).add(wish)

    async def await_call(self, number: int) -> None:
        await self._meeting(number).is_called.wait()

    async def agree(self, number: int, rank: int, point: int, wish: Wish | None) -> tuple[int, Wish]:
        meeting = self._meeting(number)
        if wish is not None:
            meeting.add(wish)
        meeting.points.setdefault(rank, point)
        if len(meeting.points) == self._num_ranks:
            meeting.is_complete.set()
        await meeting.is_complete.wait()
        assert meeting.wish is not None
        return max(meeting.points.values()), meeting.wish


class _Meeting:
    def __init__(self) -> None:
        self.wish: Wish | None = None
        self.points: dict[int, int] = {}
        self.is_called, self.is_complete = asyncio.Event(), asyncio.Event()

    def add(self, wish: Wish) -> None:
        if not self.is_complete.is_set():
            self.wish = stronger(self.wish, wish)
        self.is_called.set()
