"""How much memory a worker and the object store take as the data grows.

    python -m benchmarks.memory

Trains one worker on Parquet of growing size, each time in a process of its own, and prints the most memory that was
held: `private` is the worker's own (RssAnon), `shared` are pages of Ray's object store that it has read (RssShmem), of
the most that the store held of rows on their way. All but the first are files of 512 MB; those of more than one are
links to the first, since memory does not know of it. A peak grows with the time for which one looks: two files are
trained on once, and as often as gives as many rows as the most files have.

Allowed is: the bytes of a shuffle window × (canonical shards ÷ workers + 1), two tables of a task, and 300 MB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import side_by_side
from raykeras.blocks import TASK_NBYTES
from raykeras.plan import default_num_shards

COLUMNS = 64
ROW_NBYTES = 4 * COLUMNS
SMALL, LARGE = 20_000, 2_000_000
FILES_AND_EPOCHS = ((0, 2), (1, 2), (2, 1), (2, 20), (10, 1), (40, 1))
ALLOWED_MIB = (8 * (default_num_shards(1) + 1) + 2 * TASK_NBYTES / 2**20) + 300e6 / 2**20

WORKER = """
import json, sys, threading, time
import raykeras as rk

peak = {"private": 0, "shared": 0, "store": 0}
kinds = {"RssAnon": "private", "RssShmem": "shared"}

def build():
    import keras
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model

def watch():
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address
    while not ray.is_initialized():
        time.sleep(0.1)
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    while True:
        used = get_memory_info_reply(state).store_stats.object_store_bytes_used
        peak["store"] = max(peak["store"], used / 2**20)
        for line in open("/proc/self/status"):
            name, _, rest = line.partition(":")
            if name in kinds:
                peak[kinds[name]] = max(peak[kinds[name]], int(rest.split()[0]) / 1024)
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
source = rk.parquet(sys.argv[1], x=[f"f{i}" for i in range(64)], y="f0", cache=None)
run = rk.Run(storage=sys.argv[2], checkpoint_every=None)
rk.fit(build, source, batch_size=4096, epochs=int(sys.argv[3]), verbose=0, run=run)
print(json.dumps(peak))
"""


def write(path: Path, num_rows: int) -> None:
    """Random rows, in row groups of 10,000."""
    rng = np.random.default_rng(0)
    schema = pa.schema([(f"f{i}", pa.float32()) for i in range(COLUMNS)])
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for start in range(0, num_rows, 10_000):
            size = min(10_000, num_rows - start)
            columns = [rng.random(size, dtype=np.float32) for _ in range(COLUMNS)]
            writer.write_table(pa.table(columns, schema=schema))


def peak_mib(data: Path, epochs: int = 1) -> dict[str, float]:
    """Most MiB, private, shared and of the store, of a worker that trains on the files of a folder."""
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "-c", WORKER, str(data), storage, str(epochs)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = side_by_side.parser(__doc__)
    arguments = parser.parse_args()
    measured = []
    with tempfile.TemporaryDirectory() as temporary:
        small, large = Path(temporary) / "small", Path(temporary) / "large"
        write(small / "0.parquet", SMALL)
        write(large / "0.parquet", LARGE)
        for num_files, epochs in FILES_AND_EPOCHS:
            for i in range(1, num_files):
                if not (large / f"{i}.parquet").exists():
                    os.link(large / "0.parquet", large / f"{i}.parquet")
            peak = peak_mib(large if num_files else small, epochs)
            measured.append({"bytes": (num_files * LARGE or SMALL) * ROW_NBYTES, "epochs": epochs, **peak})
    header = ("GB of Parquet", "epochs", "private MiB", "shared MiB", "store MiB", "allowed each, MiB")
    rows = [
        (
            f"{m['bytes'] / 1e9:.3g}",
            f"{m['epochs']}",
            *(f"{m[k]:,.0f}" for k in ("private", "shared", "store")),
            f"{ALLOWED_MIB:.0f}",
        )
        for m in measured
    ]
    print(side_by_side.table(header, rows))
    side_by_side.write(arguments.json, measured)


if __name__ == "__main__":
    main()
