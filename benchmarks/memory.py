"""How much memory a worker takes as the data grows.

    python -m benchmarks.memory

Trains on a Parquet file and on one that is 100 times larger, each in a process of its own with one
worker, and prints the most memory that the worker held: `private` is its own (RssAnon), `shared` are
pages of Ray's object store that it has read (RssShmem), which are counted once for the whole node.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SMALL, LARGE = 20_000, 2_000_000
COLUMNS = 64

WORKER = """
import json, sys
import raykeras as rk

def build():
    import keras
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model

import keras
peak = {"RssAnon": 0, "RssShmem": 0}

class Peak(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        for line in open("/proc/self/status"):
            name, _, rest = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], int(rest.split()[0]) / 1024)

source = rk.parquet(sys.argv[1], x=[f"f{i}" for i in range(64)], y="f0", cache=None)
rk.fit(build, source, batch_size=4096, epochs=2, verbose=0, callbacks=[Peak()], run=rk.Run(storage=sys.argv[2]))
print(json.dumps(peak))
"""


def write(path: Path, num_rows: int) -> None:
    """Random rows, in row groups of 10,000."""
    rng = np.random.default_rng(0)
    schema = pa.schema([(f"f{i}", pa.float32()) for i in range(COLUMNS)])
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for start in range(0, num_rows, 10_000):
            size = min(10_000, num_rows - start)
            columns = [rng.random(size, dtype=np.float32) for _ in range(COLUMNS)]
            writer.write_table(pa.table(columns, schema=schema))


def peak_mib(num_rows: int, folder: Path) -> dict[str, float]:
    """Most MiB of a worker that trains on so many rows."""
    write(folder / f"{num_rows}.parquet", num_rows)
    command = [sys.executable, "-c", WORKER, str(folder / f"{num_rows}.parquet"), str(folder / "runs" / str(num_rows))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("| rows | MB | private MiB | shared MiB |\n| --- | --- | --- | --- |")
        for num_rows in (SMALL, LARGE):
            peak = peak_mib(num_rows, Path(folder))
            size = num_rows * COLUMNS * 4 / 1e6
            print(f"| {num_rows:,} | {size:,.0f} | {peak['RssAnon']:,.0f} | {peak['RssShmem']:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
