"""The memory that in-memory arrays take in the object store and in each of several workers.

    python -m benchmarks.object_store

Trains two workers for two epochs on 2 GB of float32, and on 2 GB of float64 that is converted to float32, each in a new
process. "Put" is the size of the objects that training writes to the object store, "peak" is the largest growth of the
store, and "private" is the largest growth of the private memory of each worker (the Private lines of smaps_rollup)
after its model is built, including TensorFlow's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import raykeras as rk

X_GB, WIDTH, BATCH_SIZE, EPOCHS = 2.0, 1024, 8192, 2


def measure(
    x_nbytes: float, dtype: str, folder: Path, *, batch_size: int = BATCH_SIZE, epochs: int = EPOCHS
) -> dict[str, Any]:
    """Train two workers on an array.

    Args:
        x_nbytes: Size of x in bytes.
        dtype: Data type of x.
        folder: Folder for the run.
        batch_size: Global batch size.
        epochs: Number of epochs.

    Returns:
        In bytes, the size of x, the objects that were put into the store ("put"), the largest growth of the store
        ("held"), and a list of the growth of each worker's private memory ("private").
    """
    rows = int(x_nbytes / WIDTH / np.dtype(dtype).itemsize)
    x, y = np.random.default_rng(0).random((rows, WIDTH), dtype=dtype), np.zeros((rows, 1), np.float32)
    created, used = [], []

    def record(event: rk.Event) -> None:
        if isinstance(event, rk.RunStarted | rk.EpochStarted | rk.EpochEnded):
            stats = _store_stats()
            created.append(stats.cumulative_created_bytes)
            used.append(stats.object_store_bytes_used)

    before = _store_stats()
    run = rk.Run(storage=str(folder / "runs"))
    scale = rk.Scale(workers=2)
    rk.fit(
        _build, x, y, batch_size=batch_size, epochs=epochs, verbose=0, callbacks=[_private_callback(str(folder))],
        scale=scale, run=run, on_event=record,
    )  # fmt: skip
    put = max(created) - (before.cumulative_created_bytes if before else 0)
    peak = max(used) - (before.object_store_bytes_used if before else 0)
    grown = [int((folder / f"private-{rank}").read_text()) for rank in range(scale.workers)]
    return {"x": x.nbytes, "put": put, "held": peak, "private": grown}


def _store_stats() -> Any:
    """Return the object store's statistics; None if Ray does not run."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    if not ray.is_initialized():
        return None
    return get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats


def _private_nbytes() -> int:
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()]
    return sum(int(line[1]) for line in lines if line[0].startswith("Private")) * 1024


def _build() -> Any:
    import keras

    model = keras.Sequential([keras.Input((WIDTH,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def _private_callback(folder: str) -> Any:
    import keras

    class Private(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_begin(self, logs: Any = None) -> None:
            self.initial, self.peak = _private_nbytes(), 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.peak = max(self.peak, _private_nbytes())

        def on_train_end(self, logs: Any = None) -> None:
            import ray.train

            path = Path(folder, f"private-{ray.train.get_context().get_world_rank()}")
            path.write_text(str(self.peak - self.initial))

    return Private()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="DTYPE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(X_GB * 1e9, arguments.measure, Path(folder))))
        return
    print("| x | x, GB | put, GB | peak of the store, GB | private MB per worker |\n| --- | --- | --- | --- | --- |")
    for dtype in ("float32", "float64"):
        command = [sys.executable, "-m", "benchmarks.object_store", "--measure", dtype]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        measured = json.loads(done.stdout.splitlines()[-1])
        x, put, peak = (f"{measured[name] / 1e9:.2f}" for name in ("x", "put", "held"))
        private = ", ".join(f"{grown / 1e6:,.0f}" for grown in measured["private"])
        print(f"| {dtype} | {x} | {put} | {peak} | {private} |", flush=True)


if __name__ == "__main__":
    main()
