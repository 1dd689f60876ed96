"""Coordinate the workers of a run through one actor: joint actions, events for the driver, and notes on workers.

The steps and the ends of epochs are *step boundaries*, which all workers pass in the same order. When one worker, or
the driver, wants an action, other workers may already be in the next step and wait in a collective for it. So it starts
a *round*: a thread of each worker answers with the first boundary at which that worker can still act, and all workers
act at the latest of these. Nothing is sent before a round starts, so ordinary steps cost nothing more.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from raykeras.core.errors import WorkerLostError
from raykeras.core.events import Event

StepAction = Literal["save", "stop", "leave"]
"""Save a checkpoint; stop as `model.stop_training` does; or save a checkpoint and end this attempt."""

_STRENGTH: Mapping[StepAction | None, int] = {None: 0, "save": 1, "stop": 2, "leave": 3}


def local_actor_options(num_ranks: int) -> dict[str, Any]:
    """Return the options of an actor on this node that serves a few waiting threads of each worker at once."""
    import ray

    node = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return {"num_cpus": 0, "label_selector": node, "max_concurrency": 100 + 4 * num_ranks}


class RunCoordinator:
    """Handle of the actor that the driver and the workers of a run share. Picklable.

    Args:
        num_ranks: Number of workers.
    """

    def __init__(self, num_ranks: int) -> None:
        import ray

        self._actor = ray.remote(**local_actor_options(num_ranks))(CoordinatorActor).remote(num_ranks)

    def put(self, batch: list[Event]) -> None:
        """Add events for the driver."""
        import ray

        ray.get(self._actor.put.remote(batch))

    def get(self) -> list[Event] | None:
        """Wait for the next events and return them; None at their end."""
        import ray

        return ray.get(self._actor.get.remote())

    def end(self) -> None:
        """Mark the end of the events."""
        import ray

        ray.get(self._actor.put.remote(None))

    def note(self, rank: int, **facts: str) -> None:
        """Record facts about a worker, such as what is wrong with it."""
        import ray

        ray.get(self._actor.note.remote(rank, facts))

    def join(self, rank: int, **facts: str) -> None:
        """Record the node of a worker, without waiting until the actor's process has started."""
        self._actor.note.remote(rank, facts)

    def notes(self) -> dict[int, dict[str, str]]:
        """Return the recorded facts of all workers, by rank."""
        import ray

        return dict(ray.get(self._actor.notes.remote()))

    def request(self, action: StepAction) -> None:
        """Request an action of all workers."""
        import ray

        ray.get(self._actor.request.remote(action))

    def await_round(self, round_: int) -> None:
        """Return once a round has started.

        Args:
            round_: Number of the round, from 0.
        """
        import ray

        ray.get(self._actor.await_round.remote(round_))

    def agree(self, round_: int, rank: int, boundary: int, action: StepAction | None) -> tuple[int, StepAction]:
        """Answer a round, and wait until all workers have.

        Args:
            round_: Number of the round, from 0.
            rank: Rank of the worker that answers.
            boundary: The first step boundary at which this worker can act.
            action: The action that it requests, or None.

        Returns:
            The first step boundary at which all workers can act, and the strongest of the requested actions.
        """
        import ray

        return tuple(ray.get(self._actor.agree.remote(round_, rank, boundary, action)))

    def answer(self, epoch: int, action: StepAction | None) -> None:
        """Tell the workers what to do after an epoch; see `await_answer`."""
        import ray

        ray.get(self._actor.answer.remote(epoch, action))

    def await_answer(self, epoch: int) -> StepAction | None:
        """Wait for the driver's decision after an epoch: "stop", "leave", or None to go on."""
        import ray

        action: StepAction | None = ray.get(self._actor.await_answer.remote(epoch))
        return action

    def close(self) -> None:
        """Kill the actor."""
        import ray

        ray.kill(self._actor)


class StepBarrier:
    """Makes one of several workers act at the same step boundaries as the others.

    Args:
        coordinator: Coordinator of the run.
        rank: Rank of this worker.
    """

    def __init__(self, coordinator: RunCoordinator, rank: int) -> None:
        self._coordinator, self._rank = coordinator, rank
        self._boundary = 0  # number of the next step boundary
        self._round = _Round(0)
        self._action: StepAction | None = None
        self._has_stopped = False
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="raykeras-step-barrier", daemon=True).start()

    def check(self, action: StepAction | None) -> set[StepAction]:
        """Return the actions to take at this step boundary; wait for the other workers only if a round has started.

        Args:
            action: The action that this worker requests, or None.

        Raises:
            WorkerLostError: If the coordinator's actor is gone.
        """
        if self._has_stopped:  # a callback of one worker may request something else at the end of the epoch
            return {"stop"}
        actions: set[StepAction] = set()
        while True:
            with self._lock:
                self._action = stronger(self._action, action)
                round_, boundary, action = self._round, self._boundary, None
                if not round_.is_called and self._action is None:
                    self._boundary += 1
                    return actions
                must_answer, round_.is_called = not round_.is_called, True
            if must_answer:
                self._answer(round_, boundary, self._action)
            round_.is_over.wait()
            if round_.reply is None:
                raise WorkerLostError("The run's workers could not agree on a step: the coordinator's actor is gone.")
            agreed_boundary, agreed_action = round_.reply
            with self._lock:
                if boundary < agreed_boundary:
                    self._boundary += 1
                    return actions
                actions.add(agreed_action)
                self._has_stopped |= agreed_action == "stop"
                self._action = None if stronger(self._action, agreed_action) == agreed_action else self._action
                self._round = _Round(round_.number + 1)
            threading.Thread(target=self._listen, name="raykeras-step-barrier", daemon=True).start()

    def _listen(self) -> None:
        """Answer the current round when another worker or the driver has started it."""
        round_ = self._round
        try:
            self._coordinator.await_round(round_.number)
        except Exception:  # the run is over
            return
        with self._lock:
            if round_.is_called:
                return
            round_.is_called, boundary = True, self._boundary
        self._answer(round_, boundary, None)

    def _answer(self, round_: _Round, boundary: int, action: StepAction | None) -> None:
        try:
            round_.reply = self._coordinator.agree(round_.number, self._rank, boundary, action)
        except Exception:  # `check` raises
            round_.reply = None
        round_.is_over.set()


class LocalStepBarrier:
    """`StepBarrier` for a single worker in the driver's process, with the driver's answers. Thread-safe."""

    def __init__(self) -> None:
        self._requests: deque[StepAction] = deque()
        self._answers: queue.SimpleQueue[tuple[int, StepAction | None]] = queue.SimpleQueue()

    def request(self, action: StepAction) -> None:
        """Request an action from another thread."""
        self._requests.append(action)

    def answer(self, epoch: int, action: StepAction | None) -> None:
        """Tell the worker what to do after an epoch."""
        self._answers.put((epoch, action))

    def await_answer(self, epoch: int) -> StepAction | None:
        """Wait for the driver's decision after an epoch."""
        while (answer := self._answers.get())[0] != epoch:
            pass
        return answer[1]

    def check(self, action: StepAction | None) -> set[StepAction]:
        """Return the actions to take at this step boundary.

        Args:
            action: The action that the worker requests, or None.
        """
        actions = {action} if action else set()
        while self._requests:
            actions.add(self._requests.popleft())
        return actions


class CoordinatorActor:
    """The actor behind `RunCoordinator`; its methods are the same."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._events: asyncio.Queue[list[Event] | None] = asyncio.Queue()
        self._rounds: list[_RoundState] = []
        self._notes: dict[int, dict[str, str]] = {}
        self._answers: dict[int, asyncio.Future[StepAction | None]] = {}

    async def note(self, rank: int, facts: dict[str, str]) -> None:
        self._notes.setdefault(rank, {}).update(facts)

    async def notes(self) -> dict[int, dict[str, str]]:
        return self._notes

    async def put(self, batch: list[Event] | None) -> None:
        self._events.put_nowait(batch)

    async def get(self) -> list[Event] | None:
        return await self._events.get()

    async def request(self, action: StepAction) -> None:
        num_complete = sum(round_.is_complete.is_set() for round_ in self._rounds)
        self._round(num_complete).add(action)

    async def await_round(self, number: int) -> None:
        await self._round(number).is_called.wait()

    async def agree(self, number: int, rank: int, boundary: int, action: StepAction | None) -> tuple[int, StepAction]:
        round_ = self._round(number)
        if action is not None:
            round_.add(action)
        round_.boundaries.setdefault(rank, boundary)
        if len(round_.boundaries) == self._num_ranks:
            round_.is_complete.set()
        await round_.is_complete.wait()
        assert round_.action is not None
        return max(round_.boundaries.values()), round_.action

    async def answer(self, epoch: int, action: StepAction | None) -> None:
        self._answer_after(epoch).set_result(action)

    async def await_answer(self, epoch: int) -> StepAction | None:
        return await self._answer_after(epoch)

    def _answer_after(self, epoch: int) -> asyncio.Future[StepAction | None]:
        return self._answers.setdefault(epoch, asyncio.get_running_loop().create_future())

    def _round(self, number: int) -> _RoundState:
        while len(self._rounds) <= number:
            self._rounds.append(_RoundState())
        return self._rounds[number]


def stronger(one: StepAction | None, other: StepAction | None) -> StepAction | None:
    """Return the stronger of two actions; None is the weakest."""
    return one if _STRENGTH[one] >= _STRENGTH[other] else other


class _RoundState:
    """A round in the coordinator's actor; `boundaries` are the workers' answers by rank."""

    def __init__(self) -> None:
        self.action: StepAction | None = None
        self.boundaries: dict[int, int] = {}
        self.is_called, self.is_complete = asyncio.Event(), asyncio.Event()

    def add(self, action: StepAction) -> None:
        if not self.is_complete.is_set():
            self.action = stronger(self.action, action)
        self.is_called.set()


class _Round:
    """A round on one worker; `reply` is None if the coordinator's actor is gone."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_called = False
        self.is_over = threading.Event()
        self.reply: tuple[int, StepAction] | None = None
