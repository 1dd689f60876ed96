"""When a worker's model is saved, and through what.

Enters: a model at the end of an epoch. Leaves: a checkpoint in the run's folder, and an event.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable
from typing import Any

import raykeras
from raykeras import checkpoint, events
from raykeras.events import Event
from raykeras.keras_api import KerasAPI
from raykeras.orders import Orders

Save = Callable[[str, Callable[[str], None], dict[str, float]], str]
"""Takes a checkpoint's name, what writes it into a folder, and the epoch's logs; gives its path."""


class Saver:
    """Saves checkpoints, each epoch once, and what callbacks make of the weights when training ends."""

    def __init__(self, orders: Orders, model: Any, api: KerasAPI, send: Callable[[Event], None], save: Save) -> None:
        self._orders, self._model, self._api, self._send, self._save = orders, model, api, send, save
        self._saved: int | None = None
        self._digest = 0

    def save(self, epoch: int, logs: dict[str, float], suffix: str = "") -> None:
        orders = self._orders
        state = {
            "epoch": epoch + 1,
            "step": 0,
            "seed": orders.run.seed,
            **orders.train.position,
            "logs": logs,
            "keras": {"package": self._api.name, "version": self._api.version},
            "raykeras": raykeras.__version__,
        }
        name = checkpoint.checkpoint_name(epoch + 1) + suffix
        path = self._save(name, lambda folder: checkpoint.write(folder, self._model, state), logs)
        self._saved, self._digest = epoch, self._weights_digest()
        self._send(events.CheckpointSaved(rank=0, epoch=epoch, step=0, path=path))

    def save_last(self, epoch: int, logs: dict[str, float]) -> None:
        """Saves what is not saved yet. Restored weights are not those that the last epoch's logs tell of."""
        if self._saved != epoch:
            self.save(epoch, logs)
        elif self._digest != self._weights_digest():
            self.save(epoch, {}, suffix="-restored")

    def _weights_digest(self) -> int:
        digest = 0
        for variable in self._model.trainable_variables:  # the same on all workers
            digest = zlib.crc32(variable.numpy().tobytes(), digest)
        return digest


def save_locally(orders: Orders) -> Save:
    """Stores checkpoints from this process: for a single worker."""

    def save(name: str, write: Callable[[str], None], logs: dict[str, float]) -> str:
        with tempfile.TemporaryDirectory(prefix="raykeras-checkpoint-") as folder:
            write(folder)
            return checkpoint.store(orders.folder, name, folder, orders.run.keep).path

    return save


def save_through_ray_train(orders: Orders, rank: int) -> Save:
    """Stores checkpoints through `ray.train.report`: all ranks write, the chief's is kept."""
    import ray.train

    def save(name: str, write: Callable[[str], None], logs: dict[str, float]) -> str:
        with tempfile.TemporaryDirectory(prefix="raykeras-checkpoint-") as folder:
            write(folder)
            kept = ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
            ray.train.report(dict(logs), checkpoint=kept, checkpoint_dir_name=name)
        return f"{orders.folder / checkpoint.FOLDER}/{name}"

    return save
