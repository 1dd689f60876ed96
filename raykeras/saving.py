"""When a worker's training is saved, and how it gets into the run's folder.

Enters: a training at a step. Leaves: a checkpoint in the run's folder, and an event.

The state is copied at the step, on all workers, since variables may have to be put together from all. Only the
chief writes, in a thread, while training goes on: beside its place and then into it, so that no half of a
checkpoint is ever seen. Ray Train's `report` would keep all workers waiting for its controller, and says nothing of
the order in which files come; so it is not used.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import raykeras
from raykeras import checkpoint, events
from raykeras.checkpoint import RESTORED, RunFolder
from raykeras.checks import variables_of
from raykeras.errors import CheckpointError, RaykerasError
from raykeras.events import Event
from raykeras.keras_api import KerasAPI
from raykeras.logs import as_json
from raykeras.options import Run
from raykeras.orders import Orders
from raykeras.snapshot import Buffers, Snapshot, take
from raykeras.storage_errors import is_of_storage, is_temporary

_BACKOFF_S = (0.5, 1, 2, 4, 8, 16, 30)
"""Pauses between the attempts to write a checkpoint; the last one again and again."""

_STOP_S = 30.0
_NICENESS = 10

LAST_WAIT_S = 120.0
"""How long storage may fail when there is nothing left but to write."""


class Keeper:
    """Writes checkpoints into a run's folder, one after the other, in a thread.

    Args:
        folder: The run's.
        token: What this driver claimed the folder with.
        run: How many are kept, and which is best.
        send: Takes events.
    """

    def __init__(self, folder: RunFolder, token: str, run: Run, send: Callable[[Event], None]) -> None:
        self._folder, self._token, self._run, self._send = folder, token, run, send
        self._changed = threading.Condition()
        self._waiting: tuple[str, Snapshot, Event] | None = None
        self._is_writing = self._is_failing = self._ended = False
        self._failure: RaykerasError | None = None
        self._thread = threading.Thread(target=self._work, name="raykeras-keeper", daemon=True)
        self._thread.start()

    def put(self, name: str, snapshot: Snapshot, saved: Event) -> None:
        """Takes a checkpoint to write, once the one before is written; where storage fails, in its place.

        Args:
            name: Its folder's.
            snapshot: What it holds.
            saved: Sent once it is there.

        Raises:
            CheckpointError: If nothing can be written any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_failing or self._failure or not (self._waiting or self._is_writing))
            if self._failure is not None:
                raise self._failure
            self._waiting = (name, snapshot, saved)
            self._changed.notify_all()

    def close(self) -> None:
        """Waits until all is written.

        Raises:
            CheckpointError: If that is not so after a time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not (self._waiting or self._is_writing), LAST_WAIT_S)
            unwritten = self._waiting or self._is_writing
            self._ended = True
            self._changed.notify_all()
        self._thread.join(_STOP_S)
        if self._failure is None and unwritten:
            where = self._folder.path
            raise CheckpointError(f"The last checkpoint could not be written to {where!r} in {LAST_WAIT_S:.0f} s.")
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Lets what is being written come to its end, without a word."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join(_STOP_S)

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # of this thread alone: training goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if self._waiting is None:
                    return
                self._is_writing = True
            failure = self._write_one()
            with self._changed:
                self._is_writing = self._is_failing = False
                self._failure = failure
                self._changed.notify_all()
                if failure is not None:
                    return

    def _write_one(self) -> RaykerasError | None:
        """Writes what waits, or what has taken its place since, until it is written."""
        for attempt in range(1 << 30):
            with self._changed:
                assert self._waiting is not None
                name, snapshot, saved = waiting = self._waiting
            try:
                self._store(name, snapshot)
            except Exception as error:
                if not is_temporary(error):
                    return _final(error)
                cause = _text(error)
            else:
                snapshot.release()
                self._send(saved)
                with self._changed:
                    if self._waiting is waiting:
                        self._waiting = None
                        return None
                continue
            pause = _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)]
            self._send(events.StorageFailed(rank=0, epoch=saved.epoch, step=saved.step, cause=cause, retry_s=pause))
            with self._changed:
                self._is_failing = True
                self._changed.notify_all()
                if self._changed.wait_for(lambda: self._ended, pause):
                    return CheckpointError(f"A checkpoint could not be written: {cause}")
        return None

    def _store(self, name: str, snapshot: Snapshot) -> None:
        def write(folder: str) -> None:
            snapshot.write(folder)
            if not self._folder.is_claimed_by(self._token):
                where = self._folder.path
                raise CheckpointError(
                    f"Two drivers must not share a run; another one has taken over {where!r}. This one ends."
                )

        checkpoint.store(self._folder, name, write)
        checkpoint.prune(self._folder, self._run.keep, self._run.monitor)


def _final(error: Exception) -> RaykerasError:
    """An error after which nothing is written any more."""
    if is_of_storage(error.__cause__ or error):
        return CheckpointError(f"{_text(error)} This does not pass by itself: mend it, and call `fit` again to go on.")
    if isinstance(error, RaykerasError):
        return error
    return CheckpointError(f"A checkpoint could not be written: {_text(error)}")


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, RaykerasError) else f"{type(error).__name__}: {error}"


class Saver:
    """Saves a training. Called alike on all workers.

    Args:
        orders: Of the run.
        model: What is trained.
        api: Its Keras.
        keeper: What writes; None on all workers but the chief.
        signature: What a model must have in common with this one to go on in its place, but for its variables.
        extra: Gives plain values that belong to the training, such as the callbacks' states.
    """

    def __init__(
        self,
        orders: Orders,
        model: Any,
        api: KerasAPI,
        keeper: Keeper | None,
        signature: Mapping[str, Any],
        extra: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._orders, self._model, self._api, self._keeper = orders, model, api, keeper
        self._signature, self._extra = signature, extra
        self._every = orders.run.checkpoint_every
        self._buffers = Buffers()
        self._unserializable = ""
        self._saved: tuple[int, int] | None = None
        self._saved_at = time.monotonic()
        self._digest = 0
        self._steps = 0  # since a checkpoint was due

    @property
    def is_due_by_time(self) -> bool:
        """Whether the chief's clock says so."""
        if self._keeper is None or not isinstance(self._every, timedelta):
            return False
        return time.monotonic() - self._saved_at >= self._every.total_seconds()

    def is_due_by_steps(self, total: int) -> bool:
        """Whether it is time.

        Args:
            total: Steps of all epochs that are done.
        """
        before, self._steps = self._steps, total
        return isinstance(self._every, int) and before // self._every < total // self._every

    def begin_at(self, epoch: int, step: int, total: int) -> None:
        """Training goes on from a checkpoint."""
        self._saved, self._steps, self._digest = (epoch, step), total, self._weights_digest()

    def save_step(self, epoch: int, step: int, logs: Mapping[str, Any], stopped: bool) -> None:
        """Saves in the middle of an epoch, or at the end of its steps."""
        self._save(epoch, step, {}, step_logs=as_json(logs), stopped=stopped)

    def save_epoch(self, epoch: int, logs: Mapping[str, Any], stopped: bool, must: bool) -> None:
        """Saves at the end of an epoch, if every epoch is saved or this one must be."""
        if self._every is not None or must:
            self._save(epoch + 1, 0, logs, stopped=stopped)

    def save_last(self, epoch: int, logs: Mapping[str, Any], stopped: bool) -> None:
        """Saves what is not saved yet. Restored weights are not those that the last epoch's logs tell of."""
        if self._saved != (epoch + 1, 0):
            self._save(epoch + 1, 0, logs, stopped=stopped)
        elif self._digest != self._weights_digest():
            self._save(epoch + 1, 0, {}, suffix=RESTORED, stopped=True)

    def _save(self, epoch: int, step: int, logs: Mapping[str, Any], *, suffix: str = "", **more: Any) -> None:
        orders = self._orders
        state = {
            "epoch": epoch,
            "step": step,
            "position": orders.position,
            "signature": {**self._signature, "variables": variables_of(self._model)},
            "logs": as_json(logs),
            "step_logs": {},
            "keras": {"package": self._api.name, "version": self._api.version},
            "raykeras": raykeras.__version__,
            "workers": orders.scale.workers,
            **more,
        }
        snapshot = take(self._model, self._api, state, self._extra(), self._buffers, self._unserializable)
        self._unserializable = snapshot.unserializable
        self._saved, self._saved_at = (epoch, step), time.monotonic()
        if not step:
            self._digest = self._weights_digest()
        if self._keeper is None:
            snapshot.release()
            return
        name = checkpoint.checkpoint_name(epoch, step) + suffix
        path = f"{orders.folder / checkpoint.FOLDER}/{name}"
        saved = events.CheckpointSaved(
            rank=0,
            epoch=epoch if step else epoch - 1,
            step=step,
            path=path,
            unserializable=snapshot.unserializable,
        )
        self._keeper.put(name, snapshot, saved)

    def _weights_digest(self) -> int:
        digest = 0
        for variable in self._model.trainable_variables:  # the same on all workers
            digest = zlib.crc32(variable.numpy().tobytes(), digest)
        return digest
