"""Lets all workers stop at one step, whichever of them wants to.

Enters: `model.stop_training`, set by any callback on any worker. Leaves: the same, set on all workers
after the same step.

Keras looks at `stop_training` after each step and each epoch: these are the *points*, which all
workers pass in one order. Callbacks that see the same logs set it at the same point, and then nothing
need be said. Where one worker wants to stop alone, others may have begun the next step, and wait in a
collective for it. So it calls a meeting, at the `Desk`; a thread of each worker answers with the first
point at which that worker can still stop, and all stop at the last of these. Nothing is sent before
somebody calls, so that a step costs no more.
"""

from __future__ import annotations

import threading
from typing import Any

from raykeras.desk import Desk
from raykeras.errors import WorkerLostError
from raykeras.keras_api import KerasAPI


class Agreement:
    """One worker's part in it.

    Args:
        desk: Where workers meet.
        rank: This worker's.
    """

    def __init__(self, desk: Desk, rank: int) -> None:
        self._desk, self._rank = desk, rank
        self._point = 0  # the next one
        self._reply: int | None = None
        self._answered = threading.Event()
        self._called = False
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="raykeras-stop", daemon=True).start()

    def at_point(self, wants_to_stop: bool) -> bool:
        """Whether all workers stop at this point. Waits for them if one of them wants to."""
        with self._lock:
            called, point = self._called, self._point
            if not called and not wants_to_stop:
                self._point += 1
                return False
            self._called = True
        if not called:
            self._answer(point)
        self._answered.wait()
        if self._reply is None:
            raise WorkerLostError("The run's workers could not agree where to stop: the actor between them is gone.")
        with self._lock:
            self._point += 1
        return point >= self._reply

    def _listen(self) -> None:
        try:
            self._desk.await_call()
        except Exception:  # the run is over
            return
        with self._lock:
            if self._called:
                return
            self._called, point = True, self._point
        self._answer(point)

    def _answer(self, point: int) -> None:
        try:
            self._reply = self._desk.agree(self._rank, point)
        except Exception:  # told by at_point
            self._reply = None
        self._answered.set()


def stop_callback(api: KerasAPI, agreement: Agreement) -> Any:
    """The callback, to be the last of all, that replaces this worker's wish by what all agreed on."""

    class StopCallback(api.module.callbacks.Callback):  # type: ignore[name-defined]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_training = agreement.at_point(self.model.stop_training)

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.model.stop_training = agreement.at_point(self.model.stop_training)

    return StopCallback()
