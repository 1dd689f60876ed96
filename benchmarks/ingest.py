"""The throughput from Parquet files to batches, compared with other libraries.

    python -m benchmarks.ingest [narrow small large png]

Writes Parquet files of random rows to a local disk, and reads batches inside a `tf.function`, as `fit` does with
`steps_per_execution`. The contenders alternate, each in a new process, and are measured after a warm-up:

    narrow   2,000,000 rows of 28 float32, a label and a weight; batches of 256
    small    60,000 images of 784 bytes; batches of 64
    large    4,000 images of 96 x 96 x 3 bytes; batches of 64
    png      the same images, encoded

raykeras, streamed and cached, shuffles and delivers weights; of the others only tf.data's `shuffle` does. "pyarrow" is
the limit: it reads every row group with its own threads, and converts it to NumPy arrays, with a thread per CPU to
decode images, without batches or shuffling. Petastorm is installed in a separate environment if possible, and used as
documented and with tf.data's `rebatch`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import side_by_side
from benchmarks.side_by_side import Contender

NUM_FILES, NUM_FEATURES, SIDE = 8, 28, 96
FEATURES = [f"f{i}" for i in range(NUM_FEATURES)]
SHUFFLE_ROWS = 1024  # buffer of tf.data's shuffle
TO_TF_ROWS = 500_000  # fewer rows, because `to_tf` is slow
WARM_UP_S, MEASURED_S = 6.0, 4.0

PETASTORM_PACKAGES = (
    "petastorm==0.13.1",
    "pyarrow==12.0.1",
    "numpy<2",
    "pandas<3",
    "setuptools<80",
    "tensorflow==2.15.1",
)


@dataclass(frozen=True)
class Case:
    """A data set, and how to read it.

    Attributes:
        num_rows: Number of rows.
        batch_size: Rows per batch.
        table: Function that makes a table of a number of rows.
        group_rows: Rows per row group.
        decode: Function that converts an Arrow table to arrays with as little work as possible.
        options: Arguments of `raykeras.parquet`.
    """

    num_rows: int
    batch_size: int
    table: Callable[[int, np.random.Generator], pa.Table]
    group_rows: int
    decode: Callable[[pa.Table], tuple[np.ndarray, ...]]
    options: dict[str, Any]


def narrow_table(rows: int, rng: np.random.Generator) -> pa.Table:
    columns = {name: rng.normal(size=rows).astype(np.float32) for name in FEATURES}
    weight = rng.uniform(0.5, 2, rows).astype(np.float32)
    return pa.table({**columns, "label": rng.integers(0, 2, rows), "weight": weight})


def narrow_decode(table: pa.Table) -> tuple[np.ndarray, ...]:
    x = np.empty((len(table), NUM_FEATURES), np.float32)
    for i, name in enumerate(FEATURES):
        x[:, i] = table.column(name).to_numpy()
    return x, table.column("label").to_numpy(), table.column("weight").to_numpy()


def image_table(rows: int, rng: np.random.Generator, *, nbytes: int) -> pa.Table:
    image = pa.FixedSizeListArray.from_arrays(pa.array(rng.integers(0, 256, rows * nbytes, np.uint8)), nbytes)
    return _labelled(image, rows, rng)


def _labelled(image: pa.Array, rows: int, rng: np.random.Generator) -> pa.Table:
    return pa.table({"image": image, "label": rng.integers(0, 10, rows), "weight": rng.random(rows, np.float32)})


def image_decode(table: pa.Table) -> tuple[np.ndarray, ...]:
    image = table.column("image").combine_chunks()
    x = image.flatten().to_numpy().reshape(len(table), -1)
    return x, table.column("label").to_numpy(), table.column("weight").to_numpy()


def png_table(rows: int, rng: np.random.Generator) -> pa.Table:
    from PIL import Image

    encoded = []
    for _ in range(rows):  # smooth, like photographs
        pixels = np.cumsum(rng.integers(-2, 3, (SIDE, SIDE, 3)), 0) + rng.integers(60, 190, 3)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
        encoded.append(file.getvalue())
    return _labelled(pa.array(encoded), rows, rng)


def png_pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))


def png_decode(table: pa.Table) -> tuple[np.ndarray, ...]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        x = np.stack(list(pool.map(png_pixels, table.column("image").to_pylist())))
    return x, table.column("label").to_numpy(), table.column("weight").to_numpy()


def png_transform(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**columns, "image": np.stack([png_pixels(png) for png in columns["image"]])}


IMAGE = {"x": "image", "y": "label", "sample_weight": "weight"}
CASES = {
    "narrow": Case(
        2_000_000,
        256,
        narrow_table,
        50_000,
        narrow_decode,
        {"x": FEATURES, "y": "label", "sample_weight": "weight"},
    ),
    "small": Case(60_000, 64, functools.partial(image_table, nbytes=784), 2_000, image_decode, IMAGE),
    "large": Case(4_000, 64, functools.partial(image_table, nbytes=SIDE * SIDE * 3), 100, image_decode, IMAGE),
    "png": Case(4_000, 64, png_table, 100, png_decode, {**IMAGE, "transform": png_transform}),
}


def generate(case: Case, folder: Path) -> None:
    """Write the rows of a case to files."""
    folder.mkdir(parents=True)
    for i in range(NUM_FILES):
        table = case.table(case.num_rows // NUM_FILES, np.random.default_rng(i))
        pq.write_table(table, folder / f"{i}.parquet", row_group_size=case.group_rows)


def rate(epoch: Callable[[], int]) -> float:
    """Return the rows per second of complete epochs, after a warm-up in which all reading processes start.

    Args:
        epoch: Function that reads an epoch and returns its number of rows.
    """
    warm_up_end = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < warm_up_end:
        epoch()
    start, rows = time.perf_counter(), 0
    while time.perf_counter() < start + MEASURED_S:
        rows += epoch()
    return rows / (time.perf_counter() - start)


def steady(dataset: Any, num_batches: int, next_batch: Callable[[Any], Any] = next) -> float:
    """Return the rows per second of a dataset, read as Keras' `fit` does.

    Args:
        dataset: An endless `tf.data.Dataset`.
        num_batches: Batches of an epoch.
        next_batch: Function that takes a batch from an iterator.
    """
    import tensorflow as tf

    iterator = iter(dataset)

    @tf.function  # type: ignore[untyped-decorator]
    def take(num: tf.Tensor) -> tf.Tensor:
        rows = tf.constant(0)
        for _ in tf.range(num):
            rows += tf.shape(tf.nest.flatten(next_batch(iterator))[-1])[0]
        return rows

    return rate(lambda: int(take(tf.constant(num_batches))))


def raykeras(case: Case, folder: Path, cache: Any) -> float:
    import raykeras as rk
    from raykeras.compat.tensorflow import next_in_calling_thread
    from raykeras.data.inputs import open_data, train_spec
    from raykeras.distribute.strategy import make_strategy
    from raykeras.driver.cluster import connect

    scale = rk.Scale()
    budget = connect(scale, in_process=True)
    data = open_data(rk.parquet(str(folder), **case.options, cache=cache), None, None, "float32")
    spec = train_spec(
        data,
        batch_size=case.batch_size,
        shuffle=True,
        class_weight=None,
        steps_per_epoch=None,
        scale=scale,
        seed=0,
        floatx="float32",
    )
    make_strategy(scale)  # as at the start of a worker
    stream = spec.open(0, scale, budget, num_steps=None)
    try:
        return steady(stream.endless_dataset(), spec.num_steps, next_in_calling_thread)
    finally:
        stream.close()


def pyarrow(case: Case, folder: Path) -> float:
    def epoch() -> int:
        rows = 0
        for path in sorted(folder.iterdir()):
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                rows += len(case.decode(file.read_row_group(group))[0])
        return rows

    return rate(epoch)


def groups(case: Case, folder: Path) -> Iterator[tuple[np.ndarray, ...]]:
    for path in sorted(folder.iterdir()):
        yield case.decode(pq.read_table(path))


def in_memory(case: Case, folder: Path) -> float:
    import tensorflow as tf

    arrays = tuple(np.concatenate(parts) for parts in zip(*groups(case, folder), strict=True))
    dataset = tf.data.Dataset.from_tensor_slices(arrays).shuffle(SHUFFLE_ROWS).repeat().batch(case.batch_size)
    return steady(dataset.prefetch(tf.data.AUTOTUNE), case.num_rows // case.batch_size)


def to_tf(case: Case, folder: Path) -> float:
    import ray.data

    dataset = ray.data.read_parquet(str(folder))
    x = case.options["x"]
    batches = dataset.to_tf(x, ["label", "weight"], batch_size=case.batch_size)
    num_batches = min(case.num_rows, TO_TF_ROWS) // case.batch_size
    return steady(batches.repeat(), num_batches)


def petastorm(case: Case, folder: Path, python: Path, method: str) -> float:
    num_batches = case.num_rows // case.batch_size
    arguments = [str(folder), ",".join(FEATURES), str(case.batch_size), str(num_batches), method]
    command = [str(python), str(Path(__file__).with_name("petastorm_reader.py")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return next(float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("rows/s"))


def petastorm_python(folder: Path) -> Path | None:
    """Return the Python of an environment with Petastorm, which needs an old pyarrow; None if installing it fails."""
    python = folder / "petastorm" / "bin" / "python"
    steps = [
        [sys.executable, "-m", "venv", python.parents[1]],
        [python, "-m", "pip", "install", "--quiet", *PETASTORM_PACKAGES],
        [python, "-c", "import petastorm.tf_utils"],
    ]
    for step in [] if python.exists() else steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            print(f"Petastorm cannot be installed here: {done.stderr.strip().splitlines()[-1:]}")
            return None
    return python


def contenders_of(name: str, case: Case, folder: Path, python: Path | None) -> dict[str, Contender]:
    """Return the contenders of a case, by name.

    Args:
        name: Name of the case.
        case: The case.
        folder: Folder of its files.
        python: Python of an environment with Petastorm; None to leave Petastorm out.
    """
    runs: dict[str, Callable[[Case, Path], float]] = {
        "raykeras": functools.partial(raykeras, cache=None),
        "pyarrow": pyarrow,
    }
    if name != "png":
        runs["raykeras, cached"] = functools.partial(raykeras, cache="memory")
        runs["tf.data in memory"] = in_memory
    if name == "narrow":
        runs["Ray's to_tf"] = to_tf
        if python is not None:
            runs["Petastorm, unbatch().batch()"] = functools.partial(petastorm, python=python, method="batch")
            runs["Petastorm, rebatch()"] = functools.partial(petastorm, python=python, method="rebatch")
    return {
        name: functools.partial(side_by_side.alone, functools.partial(run, case, folder)) for name, run in runs.items()
    }


def main() -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all by default")
    parser.add_argument("--data", type=Path, help="folder in which the files are written, and kept")
    parser.add_argument("--without-petastorm", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help="run only these contenders")
    arguments = parser.parse_args()
    measured = {}
    with contextlib.ExitStack() as stack:
        data = arguments.data or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        python = None if arguments.without_petastorm else petastorm_python(data)
        for name in arguments.cases or CASES:
            case, folder = CASES[name], data / name
            if not folder.exists():
                generate(case, folder)
            contenders = contenders_of(name, case, folder, python)
            if arguments.only:
                contenders = {only: contenders[only] for only in arguments.only}
            figures = side_by_side.alternate(contenders, arguments.rounds)
            measured[name] = figures
            print(f"\n{name}: {case.num_rows:,} rows, batches of {case.batch_size}\n")
            print(side_by_side.ratios(figures, next(iter(contenders)), "rows/s"), flush=True)
    side_by_side.write(arguments.json, measured)


if __name__ == "__main__":
    from benchmarks import ingest  # so that other processes unpickle functions from this module, not `__main__`

    ingest.main()
