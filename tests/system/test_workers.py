"""Several workers: what runs in which process, and what is returned."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from raykeras.compat.versions import PrivateName
from raykeras.driver.worker_pool import run_on_workers
from tests.support.compare import assert_same_weights
from tests.support.models import TWO

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(100, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)


def model_of(loss: Any = "sparse_categorical_crossentropy") -> Any:
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, activation="softmax")])
    model.compile(keras.optimizers.Adam(0.05), loss, metrics=["accuracy"])
    return model


SCRIPT = """
import json, os, sys
from pathlib import Path

import numpy as np
import ray
from ray.data import DataContext

import raykeras as rk

storage = sys.argv[1]
x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")

# a build function: this process needs no TensorFlow

def build():
    import keras

    assert DataContext.get_current().get_config("user") == 7
    assert not ray.get_runtime_context().runtime_env.get("env_vars"), "must run in a prestarted process"
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model

processes = {}

def look_at_processes(event):
    if isinstance(event, rk.EpochEnded):
        for path in Path("/proc").glob("[0-9]*"):
            try:
                is_of_this_ray = f"RAYKERAS_DRIVER={os.getpid()}" in (path / "environ").read_text()
                if is_of_this_ray or int(path.name) == os.getpid():
                    title = (path / "cmdline").read_text().replace("\\0", " ")
                    processes[int(path.name)] = title, "libtensorflow" in (path / "maps").read_text()
            except OSError:
                pass

os.environ["RAYKERAS_DRIVER"] = str(os.getpid())
DataContext.get_current().set_config("user", 7)
run = rk.Run(storage=storage, name="built")
rk.fit(build, x, x[:, :1], scale=rk.Scale(workers=2), run=run, on_event=look_at_processes)
report = {
    "imported": [name for name in ("tensorflow", "keras") if name in sys.modules],
    "driver": processes.pop(os.getpid())[1],
    "processes": list(processes.values()),
}

# a class, a closure and a lambda of this script, without registration

print("importing keras", file=sys.stderr)
import keras

class Doubles(keras.layers.Layer):
    def call(self, inputs):
        return 2 * inputs

def scaled_error(factor):
    return lambda y, p: factor * keras.ops.mean(keras.ops.square(y - p), axis=-1)

class Counts(keras.callbacks.Callback):
    steps = 0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1

def build_custom():
    model = keras.Sequential([keras.layers.Input((4,)), Doubles(), keras.layers.Dense(1)])
    model.compile("adam", scaled_error(3.0), metrics=[lambda y, p: keras.ops.abs(y - p)])
    return model

counts = Counts()
run = rk.Run(storage=f"file://{storage}", name="custom")  # a URL, not a local folder
callbacks = [counts, keras.callbacks.CSVLogger("log.csv")]
result = rk.fit(
    build_custom, x, x[:, :1], epochs=2, verbose=0, callbacks=callbacks, scale=rk.Scale(workers=2), run=run
)
model = result.model()
report["steps"] = [int(model.optimizer.iterations), counts.steps]
report["metrics"] = list(rk.evaluate(model, x, x[:, :1]))
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str, dict[str, Any]]:
    """Run a script that starts its own Ray; return its storage, lines of output, stderr and report."""
    storage = tmp_path_factory.mktemp("script")
    (storage / "script.py").write_text(SCRIPT)
    command = [sys.executable, storage / "script.py", str(storage)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert ended.returncode == 0, ended.stderr
    *lines, report = ended.stdout.splitlines()
    return storage, lines, ended.stderr, json.loads(report)


Script = tuple[Path, list[str], str, dict[str, Any]]


def test_only_workers_import_tensorflow(script: Script) -> None:
    report = script[-1]
    assert not report["imported"] and not report["driver"]
    assert sum(has_tensorflow for _, has_tensorflow in report["processes"]) == 2


def test_only_needed_actors_are_started(script: Script) -> None:
    actors = [title[5:].split(".")[0].strip() for title, _ in script[-1]["processes"] if title.startswith("ray::")]
    assert actors.count("RayTrainWorker") == 2
    assert not {"DatasetManager", "PreemptionWatcher"} & set(actors)


def test_console_shows_one_line_per_epoch(script: Script) -> None:
    _, lines, stderr, _ = script
    assert lines[0].startswith("2 workers × 1 replica  ")
    assert lines[1].startswith("Epoch 1/1: ")
    assert lines[2].startswith("completed; ")
    assert " in training steps" in lines[3]
    assert lines[4].startswith("2/2 - ")  # of `evaluate`
    assert len(lines) == 5
    assert stderr.startswith("importing keras\n")


def test_script_definitions_reach_workers(script: Script) -> None:
    storage, *_, report = script
    assert report["steps"] == [4, 4]
    assert set(report["metrics"]) == {"loss", "lambda"}
    assert (storage / "custom" / "artifacts" / "log.csv").read_text().startswith("epoch,lambda,loss")
    assert (storage / "custom" / "events.jsonl").read_text().count('"ArtifactSaved"') >= 2


@pytest.mark.usefixtures("two_workers")
def test_compiled_model_and_callbacks_are_updated(tmp_path: Path) -> None:
    import keras

    class Losses(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.losses.append(float(logs["loss"]))

    keras.utils.set_random_seed(0)
    model = model_of()
    before = model.get_weights()
    losses = Losses()
    stopping = keras.callbacks.EarlyStopping("loss", min_delta=100, patience=1)
    logger = keras.callbacks.CSVLogger("log.csv")
    run = rk.Run(storage=str(tmp_path), name="r")
    callbacks = [losses, stopping, logger]
    result = rk.fit(model, X, Y, epochs=9, verbose=0, batch_size=16, callbacks=callbacks, scale=TWO, run=run)
    assert result.model() is model
    assert int(model.optimizer.iterations) == 2 * 7
    assert any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))
    assert losses.losses == pytest.approx(result.history["loss"])
    assert stopping.stopped_epoch == 1
    assert (tmp_path / "r" / "artifacts" / "log.csv").read_text().startswith("epoch,accuracy,loss")
    assert [checkpoint.epoch for checkpoint in result.checkpoints] == [1, 2]
    assert_same_weights(result.checkpoints[-1].load_model(), model, rtol=0, atol=0)


def environment_of_worker(config: dict[str, Any]) -> tuple[list[str], int]:
    import ray

    variables = ray.get_runtime_context().runtime_env.get("env_vars", {})
    return sorted(variables), len(json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"])


@pytest.mark.usefixtures("kept_workers")  # to share the session's Ray
def test_workers_start_without_private_names_of_ray_train(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    from raykeras.compat import ray_train

    for constant, name in vars(ray_train).copy().items():
        if isinstance(name, PrivateName) and name.fallback:
            monkeypatch.setattr(ray_train, constant, dataclasses.replace(name, path=f"{name.path}_gone"))
    with pytest.warns(UserWarning, match="_gone"):
        variables, num_workers = run_on_workers(environment_of_worker, {}, scale=TWO, cpus_per_worker=0.5)
    assert set(ray_train.SETTINGS) & set(ENV_VARS_TO_PROPAGATE) <= set(variables)  # earlier releases know fewer
    assert num_workers == 2


def failing_transform(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if columns["row"].max() > 90:
        raise FloatingPointError("in the transform")
    return columns


@pytest.mark.usefixtures("two_workers")
def test_transform_failure_keeps_user_traceback(tmp_path: Path) -> None:
    rows = np.arange(100)
    table = pa.table({"x": np.ones(100, np.float32), "y": rows % 2, "row": rows})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=20)
    source = rk.parquet(tmp_path / "t.parquet", x=["x"] * 4, y="y", transform=failing_transform)
    with pytest.raises(
        rk.UserCodeError, match=r"raised FloatingPointError in file .*, row group 4\b.*: in the transform"
    ) as caught:
        rk.fit(model_of, source, verbose=0, scale=TWO, run=rk.Run(storage=str(tmp_path)))
    assert "failing_transform" in caught.value.user_traceback
    assert "site-packages" not in caught.value.user_traceback


@pytest.mark.usefixtures("kept_workers")  # to share the session's Ray
def test_user_exception_has_rank(tmp_path: Path) -> None:
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
def test_model_mismatch_on_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(rk.ModelError, match="takes 4 per row and column 'x' has 3"):
        rk.fit(model_of, X[:, :3], Y, verbose=0, scale=TWO, run=rk.Run(storage=str(tmp_path)))


@pytest.mark.usefixtures("kept_workers")  # to share the session's Ray
@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (rk.Scale(workers=900, cpus_per_worker=1), "900 workers with 1 CPUs each need 900"),
        (rk.Scale(workers=2, gpus_per_worker=4), "2 workers with 4 GPUs each need 8; .* has 0. Try `workers=1`"),
    ],
)
def test_impossible_resources_are_refused(tmp_path: Path, scale: rk.Scale, message: str) -> None:
    with pytest.raises(rk.ResourceError, match=message):
        rk.fit(model_of, X, Y, batch_size=1000, scale=scale, run=rk.Run(storage=str(tmp_path)))
    assert not list(tmp_path.iterdir())
