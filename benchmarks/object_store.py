"""What arrays in memory take of the object store and of each worker, when several train on them.

    python -m benchmarks.object_store

Trains two workers for two epochs on x of 2 GB, once of float32 and once of float64, which is converted
to float32 on its way, in a process of its own each. `put` is all that was written to the object store
by then, `held` the most that it held, and `private` by how much the memory that is a worker's own (the
Private lines of smaps_rollup) grew at most once its model was built, with all that TensorFlow takes for
the training.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

X_GB, WIDTH, BATCH_SIZE, EPOCHS = 2.0, 1024, 8192, 2

DRIVER = """
import json, sys
import numpy as np
import raykeras as rk

rows, width, dtype, batch_size, epochs, storage = json.loads(sys.argv[1])

def private():
    lines = [line.split() for line in open("/proc/self/smaps_rollup") if line.startswith("Private")]
    return sum(int(line[1]) for line in lines) * 1024

def build():
    import keras, builtins
    builtins.private_before = private()
    model = keras.Sequential([keras.Input((width,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model

def callback():
    import keras

    class Private(keras.callbacks.Callback):
        most = 0

        def on_train_batch_end(self, batch, logs=None):
            self.most = max(self.most, private())

        def on_train_end(self, logs=None):
            import builtins, ray.train
            with open(f"{storage}/private-{ray.train.get_context().get_world_rank()}", "w") as file:
                file.write(str(self.most - builtins.private_before))

    return Private()

def store():
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address
    return get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats

held = []

def look(event):
    if isinstance(event, (rk.RunStarted, rk.EpochStarted, rk.EpochEnded)):
        held.append(store().object_store_bytes_used)

x = np.random.default_rng(0).random((rows, width), dtype=dtype)
y = np.zeros((rows, 1), np.float32)
run = rk.Run(storage=f"{storage}/runs")
rk.fit(build, x, y, batch_size=batch_size, epochs=epochs, verbose=0, callbacks=[callback()],
       scale=rk.Scale(workers=2), run=run, on_event=look)
grown = [int(open(f"{storage}/private-{rank}").read()) for rank in range(2)]
print(json.dumps({"x": x.nbytes, "put": store().cumulative_created_bytes, "held": max(held), "private": grown}))
"""


def taken(
    x_nbytes: float, dtype: str, folder: Path, *, width: int = WIDTH, batch_size: int = BATCH_SIZE, epochs: int = EPOCHS
) -> dict[str, int | list[int]]:
    """Bytes of x, put into the store, held there at most, and by how much each worker's own memory grew."""
    import numpy as np

    rows = int(x_nbytes / width / np.dtype(dtype).itemsize)
    arguments = json.dumps([rows, width, dtype, batch_size, epochs, str(folder)])
    done = subprocess.run([sys.executable, "-c", DRIVER, arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    print("| x | GB in x | GB put | GB held | private MB, each worker |\n| --- | --- | --- | --- | --- |")
    for dtype in ("float32", "float64"):
        with tempfile.TemporaryDirectory() as folder:
            found = taken(X_GB * 1e9, dtype, Path(folder))
        x, put, held = (f"{found[name] / 1e9:.2f}" for name in ("x", "put", "held"))  # type: ignore[operator]
        private = ", ".join(f"{grown / 1e6:,.0f}" for grown in found["private"])  # type: ignore[union-attr]
        print(f"| {dtype} | {x} | {put} | {held} | {private} |", flush=True)


if __name__ == "__main__":
    main()
