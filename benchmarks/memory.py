"""Peak memory of a worker and of the object store as the data grows.

    python -m benchmarks.memory

Trains one worker on Parquet of growing size, each time in a new process, and prints peaks: `private` is the worker's
private memory (RssAnon), `shared` are the pages of Ray's object store that it has read (RssShmem), and `store` is the
content of the object store. All but the smallest data consists of files of 512 MB, which are hard links to one file.
Peaks also grow with the duration of a run, so a run on two files trains for enough epochs to read as many rows as the
largest data has.

The limit is the bytes of a shuffle window × (canonical shards ÷ workers + 1), two tables of a task, and 300 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import side_by_side
from raykeras.data.plan import default_num_shards
from raykeras.data.streaming.reader import TASK_NBYTES

COLUMNS = 64
ROW_NBYTES = 4 * COLUMNS
SMALL, LARGE = 20_000, 2_000_000
FILES_AND_EPOCHS = ((0, 2), (1, 2), (2, 1), (2, 20), (10, 1), (40, 1))
LIMIT_MIB = (8 * (default_num_shards(1) + 1) + 2 * TASK_NBYTES / 2**20) + 300e6 / 2**20


def write(path: Path, num_rows: int) -> None:
    """Write random rows in row groups of 10,000."""
    rng = np.random.default_rng(0)
    schema = pa.schema([(f"f{i}", pa.float32()) for i in range(COLUMNS)])
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for start in range(0, num_rows, 10_000):
            size = min(10_000, num_rows - start)
            columns = [rng.random(size, dtype=np.float32) for _ in range(COLUMNS)]
            writer.write_table(pa.table(columns, schema=schema))


def peak_mib(data: Path, epochs: int = 1) -> dict[str, float]:
    """Train on the files of a folder in this process.

    Returns:
        The peaks of "private", "shared" and "store" in MiB.
    """
    import raykeras as rk

    names = [f"f{i}" for i in range(COLUMNS)]
    source = rk.parquet(data, x=names, y=names[0], cache=None)
    with tempfile.TemporaryDirectory() as storage, _watched() as peak:
        run = rk.Run(storage=storage, checkpoint_every=None)
        rk.fit(_build, source, batch_size=4096, epochs=epochs, verbose=0, run=run)
    return peak


def _build() -> Any:
    import keras

    model = keras.Sequential([keras.Input((COLUMNS,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


@contextlib.contextmanager
def _watched() -> Iterator[dict[str, float]]:
    """Record the peak memory of this process, and of the object store once Ray runs, while the block runs."""
    kinds = {"RssAnon": "private", "RssShmem": "shared"}
    peak, closed = dict.fromkeys((*kinds.values(), "store"), 0.0), threading.Event()

    def watch() -> None:
        import ray
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        while not closed.wait(0.02):
            if ray.is_initialized():
                state = get_state_from_address(ray.get_runtime_context().gcs_address)
                used = get_memory_info_reply(state).store_stats.object_store_bytes_used
                peak["store"] = max(peak["store"], used / 2**20)
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in kinds:
                    peak[kinds[name]] = max(peak[kinds[name]], int(rest.split()[0]) / 1024)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        closed.set()
        thread.join()


def _peak_of_new_process(data: Path, epochs: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory", "--measure", str(data), str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "EPOCHS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, epochs = arguments.measure
        print(json.dumps(peak_mib(Path(folder), int(epochs))))
        return
    measured = []
    with tempfile.TemporaryDirectory() as temporary:
        small, large = Path(temporary) / "small", Path(temporary) / "large"
        write(small / "0.parquet", SMALL)
        write(large / "0.parquet", LARGE)
        for num_files, epochs in FILES_AND_EPOCHS:
            for i in range(1, num_files):
                if not (large / f"{i}.parquet").exists():
                    os.link(large / "0.parquet", large / f"{i}.parquet")
            peak = _peak_of_new_process(large if num_files else small, epochs)
            measured.append({"bytes": (num_files * LARGE or SMALL) * ROW_NBYTES, "epochs": epochs, **peak})
    header = ("GB of Parquet", "epochs", "private MiB", "shared MiB", "store MiB", "limit of each, MiB")
    rows = [
        (
            f"{m['bytes'] / 1e9:.3g}",
            f"{m['epochs']}",
            *(f"{m[k]:,.0f}" for k in ("private", "shared", "store")),
            f"{LIMIT_MIB:.0f}",
        )
        for m in measured
    ]
    print(side_by_side.table(header, rows))
    side_by_side.write(arguments.json, measured)


if __name__ == "__main__":
    main()
