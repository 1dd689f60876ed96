"""What is done at each step and each end of an epoch: save, stop, leave.

Enters: Keras' hooks, and what all workers agreed on. Leaves: a checkpoint, `model.stop_training`, or the end of `fit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from raykeras.callbacks import steps_done
from raykeras.desk import Wish
from raykeras.keras_api import KerasAPI
from raykeras.logs import plain_logs
from raykeras.saving import Saver


class Points(Protocol):
    """What says at each point what is done there; see `raykeras.agreement`."""

    def at_point(self, wish: Wish | None) -> set[Wish]: ...


class LeftError(BaseException):
    """Ends `fit` on all workers after the same step: its checkpoint is saved, and training goes on elsewhere."""


def point_callback(api: KerasAPI, points: Points, saver: Saver, first_step: int, position: tuple[int, int]) -> Any:
    """The callback, to follow all that may stop or change something, that does what all workers agreed on.

    Args:
        api: The Keras that calls it.
        points: See `raykeras.agreement`.
        saver: Saves the training.
        first_step: Step, counted through all passes, at which training begins.
        position: The same, as epoch and step in it.
    """

    class PointCallback(api.module.callbacks.Callback):  # type: ignore[name-defined]
        _supports_tf_logs = True  # or tf_keras would wait for the logs of every step

        def __init__(self) -> None:
            super().__init__()
            self._epoch, self._in_epoch = position
            self._total = first_step

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._epoch, self._in_epoch = epoch, 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            steps = self.params["steps"]
            done = steps_done(batch, steps)
            self._total, self._in_epoch = self._total + done - self._in_epoch, done
            wanted, todo = self._agreed()
            is_due = saver.is_due_by_steps(self._total) or todo & {"save", "leave"}
            if is_due and steps is not None:  # or it would not be known how many are left
                saver.save_step(self._epoch, done, plain_logs(logs), stopped=wanted)
            if "leave" in todo:
                raise LeftError

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            wanted, todo = self._agreed()
            saver.save_epoch(epoch, plain_logs(logs), stopped=wanted, must="leave" in todo)
            if "leave" in todo:
                raise LeftError

        def _agreed(self) -> tuple[bool, set[Wish]]:
            """Whether training stops here, and what else is done."""
            wanted = bool(self.model.stop_training)
            wish: Wish | None = "stop" if wanted else "save" if saver.is_due_by_time else None
            todo = points.at_point(wish)
            stops = "stop" in todo
            if stops != wanted:  # to set an attribute of a tf_keras model takes as long as all else that is done here
                self.model.stop_training = stops
            return stops or (wanted and "leave" in todo), todo

    return PointCallback()


def beat_callback(api: KerasAPI, beat: Callable[[], None]) -> Any:
    """A callback that calls `beat` after every step, of validation too."""

    class BeatCallback(api.module.callbacks.Callback):  # type: ignore[name-defined]
        _supports_tf_logs = True

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            beat()

        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            beat()

    return BeatCallback()
