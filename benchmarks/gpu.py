"""Exactness and throughput on the GPUs of one machine.

    python -m benchmarks.gpu                        all GPUs
    python -m benchmarks.gpu --write FILE           also puts the tables into a Markdown file, such as
                                                    docs/design/performance.md, between the lines `<!-- gpu -->` and
                                                    `<!-- end of gpu -->`
    python -m benchmarks.gpu --cpus 2 --small       the same on logical CPU devices, with models for CPUs

Exactness compares training on one and on all GPUs with plain `Model.fit` on one, as `benchmarks.exactness` does, in
float32 without TensorFlow-32, in mixed precision and with XLA.

Throughput is measured with ResNet-50 (images of 224 × 224, uint8, 1,000 classes) and a transformer that predicts the
next of 512 tokens (6 layers of width 512, 8 heads, 32,000 tokens), each GPU with a batch of its own size. Rows are
synthetic, one batch in memory that is repeated, or streamed from Parquet. The columns:

    images/s, tokens/s    median over the epochs but the first
    ÷ one GPU             ratio to raykeras on one GPU with the same rows
    waiting for data      share of the training time in which steps wait for data
    checkpoint            milliseconds for which training stops to save after an epoch, median
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import raykeras as rk
from benchmarks import exactness, side_by_side

START, END = "<!-- gpu -->", "<!-- end of gpu -->"
EPOCHS = 4
ROW_GROUPS = 64
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """A model and its rows.

    Attributes:
        name: Name of the model.
        unit: What a row is made of: "images" or "tokens".
        units: How many of them a row has.
        shape, dtype: A row as it is stored.
        limit: Values of a row are below it.
        batch: Number of rows of a replica.
        num_rows: Number of rows of the Parquet file.
        inputs: Returns `x` and `y` of rows as they are stored.
        build: Returns a compiled model, given `jit_compile`.
    """

    name: str
    unit: str
    units: int
    shape: tuple[int, ...]
    dtype: str
    limit: int
    batch: int
    num_rows: int
    inputs: Callable[[np.ndarray], Columns]
    build: Callable[[Any], Any]

    def rows(self, count: int) -> np.ndarray:
        """Return random rows."""
        return np.random.default_rng(0).integers(0, self.limit, (count, *self.shape), self.dtype)

    def transform(self, columns: Columns) -> Columns:
        """Return `x` and `y` of rows that were read from Parquet."""
        return self.inputs(np.frombuffer(b"".join(columns["row"]), self.dtype).reshape(-1, *self.shape))

    def write(self, folder: Path) -> rk.Source:
        """Write the Parquet file and return its source."""
        row_nbytes = int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        schema = pa.schema({"row": pa.binary(row_nbytes)})
        rows = self.rows(self.num_rows // ROW_GROUPS)
        with pq.ParquetWriter(folder / f"{self.unit}.parquet", schema) as writer:
            for _ in range(ROW_GROUPS):
                writer.write_table(pa.table({"row": [row.tobytes() for row in rows]}, schema))
        return rk.parquet(folder / f"{self.unit}.parquet", x="x", y="y", transform=self.transform, cache=None)


def labelled(images: np.ndarray) -> Columns:
    """Label each image by its first value."""
    return {"x": images, "y": images.reshape(len(images), -1)[:, 0].astype(np.int32)}


def shifted(tokens: np.ndarray) -> Columns:
    """Predict each token from those before it."""
    return {"x": tokens[:, :-1], "y": tokens[:, 1:]}


def resnet50(size: int, jit_compile: Any) -> Any:
    import keras

    image = keras.Input((size, size, 3), dtype="uint8")
    scaled = keras.layers.Rescaling(1 / 127.5, -1)(image)
    body = keras.applications.ResNet50(include_top=False, weights=None, pooling="avg", input_shape=(size, size, 3))
    logits = keras.layers.Dense(1000, dtype="float32")(body(scaled))
    return _compiled(keras.Model(image, logits), keras.optimizers.SGD(0.1, momentum=0.9), jit_compile)


def convolution(size: int, jit_compile: Any) -> Any:
    import keras

    image = keras.Input((size, size, 3), dtype="uint8")
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu")(keras.layers.Rescaling(1 / 255)(image))
    logits = keras.layers.Dense(256, dtype="float32")(keras.layers.GlobalAveragePooling2D()(x))
    return _compiled(keras.Model(image, logits), keras.optimizers.SGD(0.1, momentum=0.9), jit_compile)


def transformer(vocabulary: int, length: int, layers: int, width: int, heads: int, jit_compile: Any) -> Any:
    import keras

    tokens = keras.Input((length,), dtype="int32")
    positions = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    x = keras.layers.Embedding(vocabulary, width)(tokens) + keras.layers.Embedding(length, width)(positions)
    for _ in range(layers):
        normalized = keras.layers.LayerNormalization()(x)
        x += keras.layers.MultiHeadAttention(heads, width // heads)(normalized, normalized, use_causal_mask=True)
        hidden = keras.layers.Dense(4 * width, activation="gelu")(keras.layers.LayerNormalization()(x))
        x += keras.layers.Dense(width)(hidden)
    logits = keras.layers.Dense(vocabulary, dtype="float32")(keras.layers.LayerNormalization()(x))
    return _compiled(keras.Model(tokens, logits), keras.optimizers.AdamW(3e-4), jit_compile)


def _compiled(model: Any, optimizer: Any, jit_compile: Any) -> Any:
    import keras

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=jit_compile)
    return model


WORKLOADS = (
    Workload(
        "ResNet-50", "images", 1, (224, 224, 3), "uint8", 256, 128, 8_192, labelled, functools.partial(resnet50, 224)
    ),
    Workload(
        "transformer", "tokens", 512, (513,), "int32", 32_000, 16, 65_536, shifted,
        functools.partial(transformer, 32_000, 512, 6, 512, 8),
    ),
)  # fmt: skip
SMALL = (
    Workload(
        "convolution", "images", 1, (16, 16, 3), "uint8", 256, 8, 1_024, labelled, functools.partial(convolution, 16)
    ),
    Workload(
        "small transformer", "tokens", 16, (17,), "int32", 64, 8, 1_024, shifted,
        functools.partial(transformer, 64, 16, 1, 16, 2),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Throughput:
    """What a training reports.

    Attributes:
        rows_per_s: Rows per second, median of the epochs but the first.
        wait: Share of the training time in which steps wait for data, 0 to 1.
        saving: Seconds for which a checkpoint stops training, median.
    """

    rows_per_s: float
    wait: float = 0.0
    saving: float = 0.0


@dataclass(frozen=True)
class Machine:
    """The devices to train on, and how.

    Attributes:
        kind: "GPU", or "CPU" for logical CPU devices.
        count: Number of devices.
        steps: Number of steps of an epoch.
        jit_compile: As in `Model.compile`.
    """

    kind: str
    count: int
    steps: int
    jit_compile: Any

    @property
    def counts(self) -> list[int]:
        """The powers of two up to the number of devices, and that number."""
        return sorted({2**i for i in range(self.count.bit_length())} | {self.count})

    def scale(self, count: int) -> rk.Scale:
        """Return the scale of one worker with some of the devices."""
        return rk.Scale(gpus_per_worker=count) if self.kind == "GPU" else rk.Scale(replicas_per_worker=count)


def cases(machine: Machine) -> list[exactness.Case]:
    """Return the cases of exactness on one and on all devices."""
    rounded = [{"num_rows": 257, "weighted": True, "jit_compile": jit} for jit in (False, True)]
    exact = [{"num_rows": 17, "precision": precision} for precision in ("mixed_bfloat16", "mixed_float16")]
    is_gpu = machine.kind == "GPU"
    return [
        exactness.Case(replicas=count, gpus=is_gpu, **options)
        for count in sorted({1, machine.count})
        for options in (*rounded, *exact)
    ]


def batch_of(workload: Workload, num_rows: int) -> Any:
    """Return a dataset that repeats one batch."""
    import tensorflow as tf

    columns = workload.inputs(workload.rows(num_rows))
    return tf.data.Dataset.from_tensors((columns["x"], columns["y"])).repeat()


def train(machine: Machine, workload: Workload, source: rk.Source | None, count: int) -> Throughput:
    """Train with raykeras on some devices, from Parquet or, without a source, on one batch."""
    events: list[rk.Event] = []
    batch_size = count * workload.batch
    rows = {"x": source, "batch_size": batch_size} if source else {"x": batch_of(workload, batch_size)}
    with tempfile.TemporaryDirectory() as storage:
        rk.fit(
            functools.partial(workload.build, machine.jit_compile),
            **rows,
            epochs=EPOCHS,
            steps_per_epoch=machine.steps,
            verbose=0,
            scale=machine.scale(count),
            run=rk.Run(storage=storage, keep=1),
            on_event=events.append,
        )
    ended = [event for event in events if isinstance(event, rk.WorkerStepsEnded)][1:]
    saved = [event.seconds for event in events if isinstance(event, rk.CheckpointSaved)]
    return Throughput(
        statistics.median(event.num_steps * batch_size / event.seconds for event in ended),
        statistics.median(event.wait_s / event.seconds for event in ended),
        statistics.median(saved),
    )


def train_plain(machine: Machine, workload: Workload) -> Throughput:
    """Train with plain `Model.fit` on one batch and one device."""
    import keras

    class Clock(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_begin(self, logs: Any = None) -> None:
            self.seconds: list[float] = []

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.begin = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.seconds.append(time.perf_counter() - self.begin)

    clock = Clock()
    workload.build(machine.jit_compile).fit(
        batch_of(workload, workload.batch), epochs=EPOCHS, steps_per_epoch=machine.steps, verbose=0, callbacks=[clock]
    )
    return Throughput(machine.steps * workload.batch / statistics.median(clock.seconds[1:]))


def measure_exactness(machine: Machine) -> tuple[str, int]:
    """Return the table of differences from plain Keras, and how many are larger than allowed."""
    rows, failed = [], 0
    for case in cases(machine):
        with tempfile.TemporaryDirectory() as folder:
            difference = exactness.compare(case, Path(folder))
        within = difference.is_within(case)
        failed += not within
        precision = case.precision + ", XLA" * case.jit_compile
        verdict = "" if within else "**too large**"
        rows.append((case.replicas, precision, f"{difference.history:.1e}", f"{difference.weights:.1e}", verdict))
    return side_by_side.table((f"{machine.kind}s", "precision", "history differs", "weights differ", ""), rows), failed


def measure_throughput(machine: Machine, workload: Workload, folder: Path) -> tuple[str, dict[str, dict[str, float]]]:
    """Return the table of a workload and its figures."""
    import keras

    figures = {f"plain `Model.fit`, synthetic, 1 {machine.kind}": train_plain(machine, workload)}
    rows = [_row(workload, "plain `Model.fit`, synthetic", 1, next(iter(figures.values())), None)]
    for kind, source in (("raykeras, synthetic", None), ("raykeras, Parquet", workload.write(folder))):
        one = None
        for count in machine.counts:
            keras.backend.clear_session()
            measured = train(machine, workload, source, count)
            one = one or measured
            figures[f"{kind}, {count} {machine.kind}"] = measured
            rows.append(_row(workload, kind, count, measured, measured.rows_per_s / one.rows_per_s))
    columns = (f"{machine.kind}s", f"{workload.unit}/s", f"÷ one {machine.kind}", "waiting for data", "checkpoint, ms")
    header = (workload.name, *columns)
    return side_by_side.table(header, rows), {name: asdict(values) for name, values in figures.items()}


def _row(workload: Workload, kind: str, count: int, measured: Throughput, ratio: float | None) -> Sequence[Any]:
    figure = f"{measured.rows_per_s * workload.units:,.0f}"
    if ratio is None:
        return (kind, count, figure, "", "", "")
    return (kind, count, figure, f"{ratio:.2f}", f"{measured.wait:.1%}", f"{1e3 * measured.saving:.0f}")


def replace(text: str, tables: str) -> str:
    """Return a Markdown text with the tables between the two lines that mark their place."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"The file must have the lines {START} and {END}.")
    return f"{before}{start}\n\n{tables}\n\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--cpus", type=int, metavar="N", help="train on N logical CPU devices instead of GPUs")
    parser.add_argument("--gpus", type=int, metavar="N", help="use N GPUs, not all")
    parser.add_argument("--small", action="store_true", help="train small models")
    parser.add_argument("--steps", type=int, default=100, help="steps of an epoch (%(default)s)")
    parser.add_argument("--precision", help="dtype policy; mixed_bfloat16 on GPUs, float32 on CPUs")
    parser.add_argument("--jit-compile", choices=["auto", "true", "false"], default="auto")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file to put the tables into")
    options = parser.parse_args(arguments)
    if options.write:
        replace(options.write.read_text(), "")  # fails now, not after an hour
    import keras
    import tensorflow as tf

    if options.cpus:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * options.cpus)
    names = [
        tf.config.experimental.get_device_details(gpu).get("device_name")
        for gpu in tf.config.list_physical_devices("GPU")
    ]
    if not options.cpus and not names:
        raise SystemExit("TensorFlow sees no GPU; `raykeras doctor` says why. Pass `--cpus 2` to try this command.")
    jit_compile = {"auto": "auto", "true": True, "false": False}[options.jit_compile]
    kind, count = ("CPU", options.cpus) if options.cpus else ("GPU", options.gpus or len(names))
    machine = Machine(kind, count, options.steps, jit_compile)

    tf.config.experimental.enable_tensor_float_32_execution(False)
    differences, failed = measure_exactness(machine)
    tf.config.experimental.enable_tensor_float_32_execution(True)
    tables, figures = [differences], {}
    print(differences, flush=True)
    precision = options.precision or ("float32" if options.cpus else "mixed_bfloat16")
    keras.config.set_dtype_policy(precision)
    for workload in SMALL if options.small else WORKLOADS:
        with tempfile.TemporaryDirectory() as folder:
            table, figures[workload.name] = measure_throughput(machine, workload, Path(folder))
        tables.append(table)
        print(f"\n{table}", flush=True)
    versions = f"TensorFlow {tf.__version__}, Keras {keras.__version__}, {precision}"
    devices = f"{count} × {names[0]}" if not options.cpus else f"{count} logical CPU devices"
    if options.write:
        text = replace(options.write.read_text(), "\n\n".join([f"{devices}; {versions}.", *tables]))
        options.write.write_text(text)
    side_by_side.write(options.json, {"devices": devices, "precision": precision, **figures})
    raise SystemExit(f"{failed} cases differ by more than allowed" if failed else 0)


if __name__ == "__main__":
    from benchmarks import gpu  # so that other processes unpickle functions from this module, not `__main__`

    gpu.main()
