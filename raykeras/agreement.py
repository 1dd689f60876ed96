"""Lets all workers do a thing at one step: save, stop, or leave.

Enters: what one worker, or the driver, wants. Leaves: on all workers, after the same step, what is done there.

The steps and the ends of epochs are *points*, which all workers pass in one order. Where a worker alone wants
something, others may have begun the next step, and wait in a collective for it. So it calls a meeting, at the
`Desk`; a thread of each worker answers with the first point at which that worker can still do it, and all do it at
the last of these. Nothing is sent before somebody calls, so that a step costs no more.
"""

from __future__ import annotations

import threading

from raykeras.desk import Desk, Wish, stronger
from raykeras.errors import WorkerLostError


class Agreement:
    """One worker's part in it.

    Args:
        desk: Where workers meet.
        rank: This worker's.
    """

    def __init__(self, desk: Desk, rank: int) -> None:
        self._desk, self._rank = desk, rank
        self._point = 0  # the next one
        self._meeting = _Meeting(0)
        self._wish: Wish | None = None
        self._has_stopped = False
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="raykeras-agreement", daemon=True).start()

    def at_point(self, wish: Wish | None) -> set[Wish]:
        """What is done at this point. Waits for the other workers if one of all wants something.

        Args:
            wish: What this worker wants.
        """
        if self._has_stopped:  # whatever one worker's callbacks make of it at the end of the epoch
            return {"stop"}
        done: set[Wish] = set()
        while True:
            with self._lock:
                self._wish = stronger(self._wish, wish)
                meeting, point, wish = self._meeting, self._point, None
                if not meeting.is_called and self._wish is None:
                    self._point += 1
                    return done
                answers, meeting.is_called = not meeting.is_called, True
            if answers:
                self._answer(meeting, point, self._wish)
            meeting.is_over.wait()
            if meeting.reply is None:
                raise WorkerLostError("The run's workers could not agree on a step: the actor between them is gone.")
            agreed, chosen = meeting.reply
            with self._lock:
                if point < agreed:
                    self._point += 1
                    return done
                done.add(chosen)
                self._has_stopped |= chosen == "stop"
                self._wish = None if stronger(self._wish, chosen) == chosen else self._wish
                self._meeting = _Meeting(meeting.number + 1)
            threading.Thread(target=self._listen, name="raykeras-agreement", daemon=True).start()

    def _listen(self) -> None:
        meeting = self._meeting
        try:
            self._desk.await_call(meeting.number)
        except Exception:  # the run is over
            return
        with self._lock:
            if meeting.is_called:
                return
            meeting.is_called, point = True, self._point
        self._answer(meeting, point, None)

    def _answer(self, meeting: _Meeting, point: int, wish: Wish | None) -> None:
        try:
            meeting.reply = self._desk.agree(meeting.number, self._rank, point, wish)
        except Exception:  # told by at_point
            meeting.reply = None
        meeting.is_over.set()


class _Meeting:
    def __init__(self, number: int) -> None:
        self.number = number
        self.is_called = False
        self.is_over = threading.Event()
        self.reply: tuple[int, Wish] | None = None


class Alone:
    """The same for one worker in the driver's process. Thread-safe."""

    def __init__(self) -> None:
        self._wishes: set[Wish] = set()

    def call(self, wish: Wish) -> None:
        """Wants something of the worker, from outside."""
        self._wishes.add(wish)

    def at_point(self, wish: Wish | None) -> set[Wish]:
        if wish is None and not self._wishes:
            return set()
        wishes, self._wishes = self._wishes, set()
        return wishes | ({wish} if wish else set())
