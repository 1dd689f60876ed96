"""A real run on two workers that is killed twice and loses a worker.

    python -m tests.support.interrupted_run FOLDER EPOCHS

calls `fit` once for the run FOLDER/run, which must be repeated until it is not killed; `make` does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import raykeras as rk
from pipelines.digits import DATA, build
from tests.support.resuming import slow

_STARTED, _ENDED = "fit is called at ", "fit ends at "


class DriverKiller(rk.DriverCallback):
    """Kills the driver in the middle of some epochs, once in each.

    Args:
        folder: Folder in which a file is created for each kill.
        epochs: The epochs.
    """

    def __init__(self, folder: str, epochs: tuple[int, ...]) -> None:
        self._folder, self._epochs = folder, epochs

    def on_event(self, event: rk.Event) -> None:
        if isinstance(event, rk.BatchEnded):
            is_there = event.epoch in self._epochs and (event.step or 0) >= 25 and self._is_written(event)
            if is_there and _is_first(self._folder, f"driver {event.epoch}"):
                print(f"{_ENDED}{time.time()}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

    def _is_written(self, event: rk.Event) -> bool:
        """Return whether the log ends with an event; batches within a second share a line."""
        return str(event.time) in Path(self._folder, "run", "events.jsonl").read_text().splitlines()[-1]


def worker_killer(folder: str, epoch: int) -> Any:
    """Return a callback that kills the worker of rank 1 in the middle of an epoch.

    Args:
        folder: Folder in which a file is created when it is killed.
        epoch: The epoch.
    """
    import keras

    class WorkerKiller(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, number: int, logs: Any = None) -> None:
            self.epoch = number

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            import ray.train

            rank = ray.train.get_context().get_world_rank()
            if rank == 1 and (self.epoch, batch) == (epoch, 30) and _is_first(folder, "worker"):
                os.kill(os.getpid(), signal.SIGKILL)

    return WorkerKiller()


def callbacks() -> list[Any]:
    """Return callbacks that do not kill: steps are slower, and the learning rate is reduced."""
    import keras

    return [slow(0.08), keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1)]


def _is_first(folder: str, name: str) -> bool:
    """Return whether a file is new, and create it."""
    path = Path(folder, name)
    if path.exists():
        return False
    path.touch()
    return True


def train(folder: str, epochs: int) -> None:
    """Train the run until it ends or this process is killed.

    Args:
        folder: Storage of the run.
        epochs: Number of epochs, at least 4; the processes are killed after a quarter, a half, and three quarters.
    """
    columns = {"x": "image", "y": "label"}
    options = {
        "x": rk.parquet(f"{DATA}/train", sample_weight="weight", cache=None, **columns),
        "validation_data": rk.parquet(f"{DATA}/test", **columns),
        "callbacks": [
            *callbacks(),
            DriverKiller(folder, (epochs // 4, 3 * epochs // 4)),
            worker_killer(folder, epochs // 2),
        ],
        "scale": rk.Scale(workers=2),
        "run": rk.Run(storage=folder, name="run", checkpoint_every=20),
    }
    fit = rk.fit  # imports it
    print(f"{_STARTED}{time.time()}", flush=True)
    fit(build, batch_size=32, epochs=epochs, verbose=0, **options)
    print(f"{_ENDED}{time.time()}", flush=True)


def make(folder: Path, epochs: int, **environment: str) -> tuple[Path, float]:
    """Make the run.

    Args:
        folder: Storage of the run.
        epochs: As for `train`.
        **environment: Environment variables of its processes.

    Returns:
        The run's folder, and the seconds that the calls of `fit` took together.
    """
    seconds = 0.0
    command = [sys.executable, "-m", "tests.support.interrupted_run", str(folder), str(epochs)]
    for expected in (-signal.SIGKILL, -signal.SIGKILL, 0):
        ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
        assert ended.returncode == expected, ended.stderr
        begin, end = (float(ended.stdout.split(text)[1].splitlines()[0]) for text in (_STARTED, _ENDED))
        seconds += end - begin
    return folder / "run", seconds


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
