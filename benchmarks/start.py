"""The time from the start of a program to the end of the first training step.

    python -m benchmarks.start [local workers]

Each contender is a program:

    local     plain Keras on arrays; `rk.fit` from Parquet with one worker, cached and streamed; and `ray.init`
    workers   Ray's `TensorflowTrainer` on two workers, on arrays; and `rk.fit` on two workers, from Parquet
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import side_by_side
from benchmarks.side_by_side import Contender

ROWS, BATCH = 20_000, 64

MODEL = """
import sys, time
def build():
    import keras
    inputs = keras.Input((784,), dtype="uint8")
    x = keras.layers.Dense(64, "relu")(keras.layers.Rescaling(1 / 255)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(10, "softmax")(x))
    model.compile("rmsprop", "sparse_categorical_crossentropy")
    return model
def stop():
    import keras
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if not batch:
                with open(sys.argv[2], "a") as file:
                    file.write(f"{time.time()}\\n")
                self.model.stop_training = True
    return Stop()
"""
PLAIN = """
import numpy as np
x, y = np.zeros((1000, 784), np.uint8), np.zeros(1000)
build().fit(x, y, batch_size=64, callbacks=[stop()], verbose=0)
"""
LOCAL = """
import raykeras as rk
source = rk.parquet(sys.argv[1], x="x", y="y", cache={cache!r})
rk.fit(build, source, batch_size=64, callbacks=[stop()], run=rk.Run(storage=sys.argv[3]), verbose=0)
"""
RAY = """
import sys, time, ray
ray.init(logging_level="ERROR")
with open(sys.argv[2], "a") as file:
    file.write(f"{time.time()}\\n")
"""
WORKERS = """
import raykeras as rk
class First:
    seen = False
def first(event):
    if isinstance(event, rk.BatchEnded) and not First.seen:
        First.seen = True
        with open(sys.argv[2], "a") as file:
            file.write(f"{time.time()}\\n")
source = rk.parquet(sys.argv[1], x="x", y="y")
run = rk.Run(storage=sys.argv[3])
rk.fit(build, source, batch_size=64, run=run, scale=rk.Scale(workers=2), on_event=first, verbose=0)
"""
TENSORFLOW_TRAINER = """
import numpy as np, ray
from ray.train import RunConfig, ScalingConfig
from ray.train.tensorflow import TensorflowTrainer
def loop(config):
    import tensorflow as tf
    import tf_keras
    class Stop(tf_keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if not batch and ray.train.get_context().get_world_rank() == 0:
                with open(config["file"], "a") as file:
                    file.write(f"{time.time()}\\n")
    with tf.distribute.MultiWorkerMirroredStrategy().scope():
        layers = tf_keras.layers
        model = tf_keras.Sequential([layers.Rescaling(1 / 255), layers.Dense(64, "relu"), layers.Dense(10, "softmax")])
        model.compile("rmsprop", "sparse_categorical_crossentropy")
    x, y = np.zeros((1000, 784), np.uint8), np.zeros(1000)
    model.fit(x, y, batch_size=64, callbacks=[Stop()], verbose=0)
trainer = TensorflowTrainer(
    loop, train_loop_config={"file": sys.argv[2]}, run_config=RunConfig(storage_path=sys.argv[3], name="run"),
    scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
)
trainer.fit()
"""


def seconds(program: str, data: Path) -> float:
    """Return the seconds until a program has made its first step."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "program.py").write_text(textwrap.dedent(program))
        stamps = folder / "stamps"
        command = [sys.executable, str(folder / "program.py"), str(data), str(stamps), str(folder / "runs")]
        start = time.time()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        return float(stamps.read_text().split()[0]) - start


def main() -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="both by default")
    arguments = parser.parse_args()
    programs = {
        "local": {
            "plain Keras": MODEL + PLAIN,
            "ray.init": RAY,
            "rk.fit, cached": MODEL + LOCAL.format(cache="auto"),
            "rk.fit, streamed": MODEL + LOCAL.format(cache=None),
        },
        "workers": {"TensorflowTrainer": MODEL + TENSORFLOW_TRAINER, "rk.fit": MODEL + WORKERS},
    }
    measured = {}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data.parquet"
        rng = np.random.default_rng(0)
        image = pa.FixedSizeListArray.from_arrays(pa.array(rng.integers(0, 256, ROWS * 784, np.uint8)), 784)
        pq.write_table(pa.table({"x": image, "y": rng.integers(0, 10, ROWS)}), data, row_group_size=1_000)
        for case in arguments.cases or programs:
            contenders: dict[str, Contender] = {
                name: functools.partial(seconds, program, data) for name, program in programs[case].items()
            }
            figures = side_by_side.alternate(contenders, arguments.rounds)
            measured[case] = figures
            medians = {name: statistics.median(values) for name, values in figures.items()}
            rows = []
            for name, value in medians.items():
                ratio = ""
                if case == "local" and name.startswith("rk.fit"):
                    limit = medians["plain Keras"] * 1.3 + (medians["ray.init"] if name.endswith("streamed") else 0)
                    ratio = f"{value / limit:.2f} of 1.3 × plain" + (" + ray.init" if name.endswith("streamed") else "")
                elif name == "rk.fit":
                    ratio = f"{value / medians['TensorflowTrainer']:.2f} of TensorflowTrainer"
                rows.append((name, f"{value:.1f}", f"{min(figures[name]):.1f}–{max(figures[name]):.1f}", ratio))
            print(f"\n{case}\n")
            print(side_by_side.table(("to the first step", "s", "range", ""), rows), flush=True)
    side_by_side.write(arguments.json, measured)


if __name__ == "__main__":
    main()
