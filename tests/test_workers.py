"""Several workers: processes of their own, in which alone TensorFlow lives."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk

ROOT = Path(__file__).parent.parent
TWO = rk.Scale(workers=2)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(100, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)


def model_of(loss: Any = "sparse_categorical_crossentropy") -> Any:
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, activation="softmax")])
    model.compile(keras.optimizers.Adam(0.05), loss, metrics=["accuracy"])
    return model


def test_only_workers_import_tensorflow_and_only_what_is_used_is_started(tmp_path: Path) -> None:
    """The driver, and every other process of its Ray, looked at from outside while it trains.

    Of Ray Train's actors those for its own datasets and for preemption are left out; Ray Data's context, which the
    former is started beside, is still handed on.
    """
    script = f"""
    import os, ray, sys
    import numpy as np
    import raykeras as rk
    from ray.data import DataContext

    def build():
        import keras
        assert DataContext.get_current().get_config("mine") == 7
        assert not ray.get_runtime_context().runtime_env.get("env_vars"), "takes no process that was started ahead"
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model

    found = {{}}

    def look(event):
        if isinstance(event, rk.EpochEnded):
            me = os.getpid()
            for pid in filter(str.isdigit, os.listdir("/proc")):
                try:
                    maps = open(f"/proc/{{pid}}/maps").read()
                    name = open(f"/proc/{{pid}}/cmdline").read().replace(chr(0), " ").strip()
                    if f"RAYKERAS_TEST={{me}}" in open(f"/proc/{{pid}}/environ").read() or pid == str(me):
                        found[pid] = (name, "libtensorflow" in maps)
                except OSError:
                    pass

    os.environ["RAYKERAS_TEST"] = str(os.getpid())
    DataContext.get_current().set_config("mine", 7)
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    rk.fit(build, x, x[:, :1], scale=rk.Scale(workers=2), run=rk.Run(storage={str(tmp_path)!r}), on_event=look)
    assert "tensorflow" not in sys.modules and "keras" not in sys.modules
    assert not found[str(os.getpid())][1]
    actors = sorted(name[5:].split(".")[0] for name, _ in found.values() if name.startswith("ray::"))
    print("PROCESSES", sum(loaded for _, loaded in found.values()), *actors)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_TRAIN_")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *shown, last = done.stdout.splitlines()
    _, with_tensorflow, *actors = last.split()
    assert int(with_tensorflow) == 2
    assert actors.count("RayTrainWorker") == 2
    assert not {"DatasetManager", "PreemptionWatcher"} & set(actors)
    assert [line.split("  ")[0] for line in shown[:2]] == ["2 workers × 1 replica", "epoch 1/1"]
    assert len(shown) == 3
    assert done.stderr == ""


@pytest.mark.usefixtures("two_workers")
def test_a_compiled_model_and_its_callbacks_come_back_trained(tmp_path: Path) -> None:
    import keras

    class Remembers(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[float] = []

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.seen.append(float(logs["loss"]))

    keras.utils.set_random_seed(0)
    model = model_of()
    before = model.get_weights()
    mine = Remembers()
    stopping = keras.callbacks.EarlyStopping("loss", min_delta=100, patience=1)
    logger = keras.callbacks.CSVLogger("log.csv")
    run = rk.Run(storage=str(tmp_path), name="r")
    callbacks = [mine, stopping, logger]
    result = rk.fit(model, X, Y, epochs=9, verbose=0, batch_size=16, callbacks=callbacks, scale=TWO, run=run)
    assert result.model() is model
    assert int(model.optimizer.iterations) == 2 * 7
    assert any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))
    assert mine.seen == pytest.approx(result.history["loss"])
    assert stopping.stopped_epoch == 1
    assert (tmp_path / "r" / "artifacts" / "log.csv").read_text().startswith("epoch,accuracy,loss")
    assert [checkpoint.epoch for checkpoint in result.checkpoints] == [1, 2]
    saved = result.checkpoints[-1].load_model()
    for ours, theirs in zip(model.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def failing_transform(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if columns["row"].max() > 90:
        raise FloatingPointError("in the transform")
    return columns


@pytest.mark.usefixtures("two_workers")
def test_a_transform_that_fails_on_later_rows_comes_with_the_users_traceback(tmp_path: Path) -> None:
    rows = np.arange(100)
    table = pa.table({"x": np.ones(100, np.float32), "y": rows % 2, "row": rows})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=20)
    source = rk.parquet(tmp_path / "t.parquet", x=["x"] * 4, y="y", transform=failing_transform)
    with pytest.raises(rk.UserCodeError, match="raised FloatingPointError: in the transform") as caught:
        rk.fit(model_of, source, verbose=0, scale=TWO, run=rk.Run(storage=str(tmp_path)))
    assert "failing_transform" in caught.value.user_traceback
    assert "site-packages" not in caught.value.user_traceback


def test_an_exception_on_one_worker_comes_with_its_rank(tmp_path: Path) -> None:
    import keras

    class FailsOnOne(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            import ray.train

            if ray.train.get_context().get_world_rank() == 1:
                raise ArithmeticError("only here")

    run = rk.Run(storage=str(tmp_path))
    with pytest.raises(rk.UserCodeError, match="ArithmeticError: only here") as caught:
        rk.fit(model_of, X, Y, verbose=0, callbacks=[FailsOnOne()], scale=TWO, run=run)
    assert caught.value.rank == 1
    assert "on_epoch_end" in caught.value.user_traceback
    assert len(str(caught.value).splitlines()) < 12


@pytest.mark.usefixtures("two_workers")
def test_a_wrong_model_is_told_of_as_such(tmp_path: Path) -> None:
    with pytest.raises(rk.ModelError, match="takes 4 a row and column 'x' gives 3"):
        rk.fit(model_of, X[:, :3], Y, verbose=0, scale=TWO, run=rk.Run(storage=str(tmp_path)))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (rk.Scale(workers=900, cpus_per_worker=1), "900 workers with 1 CPUs each need 900"),
        (rk.Scale(workers=2, gpus_per_worker=4), "2 workers with 4 GPUs each need 8; .* has 0. Try `workers=1`"),
    ],
)
def test_what_the_cluster_can_never_give_is_said_at_once(tmp_path: Path, scale: rk.Scale, message: str) -> None:
    with pytest.raises(rk.ResourceError, match=message):
        rk.fit(model_of, X, Y, batch_size=1000, scale=scale, run=rk.Run(storage=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_what_a_script_defines_reaches_the_workers_and_comes_back(tmp_path: Path) -> None:
    """A class, a closure and a lambda of `__main__`, in a function that builds and in a callback."""
    script = f"""
    import keras, numpy as np, raykeras as rk

    class Doubles(keras.layers.Layer):
        def call(self, inputs):
            return 2 * inputs

    def scaled_error(factor):
        return lambda y, p: factor * keras.ops.mean(keras.ops.square(y - p), axis=-1)

    class Counts(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch, logs=None):
            self.steps += 1

    def build():
        model = keras.Sequential([keras.layers.Input((4,)), Doubles(), keras.layers.Dense(1)])
        model.compile("adam", scaled_error(3.0), metrics=[lambda y, p: keras.ops.abs(y - p)])
        return model

    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    counts = Counts()
    run = rk.Run(storage="file://{tmp_path}", name="r")  # not taken for a local folder
    callbacks = [counts, keras.callbacks.CSVLogger("log.csv")]
    result = rk.fit(
        build, x, x[:, :1], epochs=2, verbose=0, callbacks=callbacks, scale=rk.Scale(workers=2), run=run
    )
    model = result.model()
    assert int(model.optimizer.iterations) == counts.steps == 4
    assert rk.evaluate(model, x, x[:, :1]).keys() == {{"loss", "lambda"}}, rk.evaluate(model, x, x[:, :1])
    print("DONE", result.history["loss"][-1])
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("DONE")
    assert (tmp_path / "r" / "artifacts" / "log.csv").read_text().startswith("epoch,lambda,loss")
    told = (tmp_path / "r" / "events.jsonl").read_text()
    assert told.count('"ArtifactSaved"') >= 2
