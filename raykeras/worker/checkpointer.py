"""Decide when a worker's training is saved, and copy its state for the checkpoint writer.

The state is copied at the step, on all workers, because variables may have to be merged from all of them. Only the
chief writes, in a thread, while training continues; a checkpoint becomes visible when it is complete. Ray Train's
`report` is not used: it keeps all workers waiting for its controller, and does not order the files of a checkpoint.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import raykeras
from raykeras.checkpoint import store as checkpoint
from raykeras.checkpoint.snapshot import take_snapshot, variables_of
from raykeras.checkpoint.store import RESTORED
from raykeras.checkpoint.writer import AsyncCheckpointWriter
from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.keras_saving import Buffers
from raykeras.core import events
from raykeras.core.logs import as_json
from raykeras.worker.job import TrainJob

_CONTINUOUS_S = 1.0
"""The shortest time between continuous checkpoints: each one stops all workers for the time that copying takes."""


class CheckpointManager:
    """Saves a training. All workers must make the same calls.

    Args:
        job: Job of the run.
        model: The model being trained.
        api: The model's Keras package.
        writer: Writes checkpoints; None on all workers but the chief.
        signature: What a model must share with this one, besides its variables, to resume from a checkpoint.
        extra: Returns serializable values to save with the training, such as the callbacks' states.
    """

    def __init__(
        self,
        job: TrainJob,
        model: Any,
        api: KerasAPI,
        writer: AsyncCheckpointWriter | None,
        signature: Mapping[str, Any],
        extra: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._job, self._model, self._api, self._writer = job, model, api, writer
        self._signature, self._extra = signature, extra
        self._every = job.run.checkpoint_every
        self._buffers = Buffers()
        self._unserializable = ""
        self._saved: tuple[int, int] | None = None
        self._saved_at = time.monotonic()
        self._digest = 0
        self._num_steps = 0  # of all epochs, at the last call of `is_due_by_steps`

    @property
    def is_due_by_time(self) -> bool:
        """Whether a checkpoint is due by the chief's clock and its writer; False on other workers."""
        if self._writer is None:
            return False
        passed_s = time.monotonic() - self._saved_at
        if self._every == "continuous":
            return passed_s >= _CONTINUOUS_S and self._writer.is_idle
        return isinstance(self._every, timedelta) and passed_s >= self._every.total_seconds()

    def is_due_by_steps(self, total: int) -> bool:
        """Return whether a checkpoint became due since the last call.

        Args:
            total: Number of steps of all epochs that are done.
        """
        previous, self._num_steps = self._num_steps, total
        return isinstance(self._every, int) and previous // self._every < total // self._every

    def set_position(self, epoch: int, step: int, total: int) -> None:
        """Set the position of the checkpoint from which training continues.

        Args:
            epoch: Number of finished epochs.
            step: Number of finished steps in the next epoch.
            total: Number of finished steps of all epochs.
        """
        self._saved, self._num_steps, self._digest = (epoch, step), total, self._weights_digest()

    def save_step(self, epoch: int, step: int, logs: Mapping[str, Any], stopped: bool) -> None:
        """Save in the middle of an epoch, or after its last step."""
        self._save(epoch, step, {}, step_logs=as_json(logs), stopped=stopped)

    def save_epoch(self, epoch: int, logs: Mapping[str, Any], stopped: bool, must: bool) -> None:
        """Save at the end of an epoch if the run takes checkpoints, or if `must`."""
        if self._every is not None or must:
            self._save(epoch + 1, 0, logs, stopped=stopped)

    def save_last(self, epoch: int, logs: Mapping[str, Any], stopped: bool) -> None:
        """Save the end of training if it is not saved yet.

        Weights that a callback restored after the last epoch are saved without logs, since that epoch's logs do not
        describe them.
        """
        if self._saved != (epoch + 1, 0):
            self._save(epoch + 1, 0, logs, stopped=stopped)
        elif self._digest != self._weights_digest():
            self._save(epoch + 1, 0, {}, suffix=RESTORED, stopped=True)

    def _save(self, epoch: int, step: int, logs: Mapping[str, Any], *, suffix: str = "", **fields: Any) -> None:
        job, begun = self._job, time.time()
        state = {
            "epoch": epoch,
            "step": step,
            "position": job.position,
            "signature": {**self._signature, "variables": variables_of(self._model)},
            "logs": as_json(logs),
            "step_logs": {},
            "keras": {"package": self._api.name, "version": self._api.version},
            "raykeras": raykeras.__version__,
            "workers": job.scale.workers,
            **fields,
        }
        snapshot = take_snapshot(self._model, self._api, state, self._extra(), self._buffers, self._unserializable)
        self._unserializable = snapshot.unserializable
        self._saved, self._saved_at = (epoch, step), time.monotonic()
        if not step:
            self._digest = self._weights_digest()
        if self._writer is None:
            snapshot.release()
            return
        name = checkpoint.checkpoint_name(epoch, step) + suffix
        path = f"{job.folder / checkpoint.FOLDER}/{name}"
        saved = events.CheckpointSaved(
            rank=0,
            epoch=epoch if step else epoch - 1,
            step=step,
            path=path,
            unserializable=snapshot.unserializable,
        )
        self._writer.put(name, snapshot, saved, begun)

    def _weights_digest(self) -> int:
        """Return a checksum of the trainable variables, the same on all workers."""
        digest = 0
        for variable in self._model.trainable_variables:
            digest = zlib.crc32(variable.numpy().tobytes(), digest)
        return digest
