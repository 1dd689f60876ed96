"""Workers that stay up between calls: which calls use them, what a call leaves to the next, and when they end."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raykeras as rk
from raykeras.driver import worker_pool
from raykeras.driver.worker_pool import run_on_workers
from tests.support.models import PACKAGES, TWO, X, Y, dense

pytestmark = pytest.mark.usefixtures("two_workers")

OPTIONS: dict[str, Any] = {"batch_size": 16, "epochs": 2, "shuffle": False, "verbose": 0}


def pids_of(config: dict[str, Any]) -> list[int]:
    """Return the process ids of all workers."""
    import ray.train
    from ray.train.collective import barrier

    context, folder = ray.train.get_context(), Path(config["folder"])
    (folder / str(context.get_world_rank())).write_text(str(os.getpid()))
    barrier()
    return [int((folder / str(rank)).read_text()) for rank in range(context.get_world_size())]


def workers(folder: Path, scale: rk.Scale = TWO) -> list[int]:
    """Return the process ids of the workers that the next call with a scale uses."""
    pids = run_on_workers(pids_of, {"folder": str(folder)}, scale=scale, cpus_per_worker=1.0)
    assert len(set(pids)) == 2 and os.getpid() not in pids
    return list(pids)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_no_thread_waits_in_ray_while_workers_are_idle(tmp_path: Path) -> None:
    workers(tmp_path)
    frames = sys._current_frames()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "raykeras-workers"]
    stack = traceback.extract_stack(frames[thread.ident or 0])
    assert any("raykeras" in frame.filename for frame in stack)
    assert not any(frame.name in ("get", "wait") and "/ray/" in frame.filename for frame in stack)


def test_calls_use_the_same_workers(tmp_path: Path) -> None:
    pids = workers(tmp_path)
    result = rk.fit(dense("keras"), X, Y, scale=TWO, run=rk.Run(storage=str(tmp_path / "runs")), **OPTIONS)
    assert workers(tmp_path) == pids
    rk.evaluate(result.checkpoints[-1], X, Y, scale=TWO, verbose=0)
    assert workers(tmp_path) == pids


def change_everything(config: dict[str, Any]) -> None:
    import tensorflow as tf

    keras = importlib.import_module(config["package"])
    keras.backend.set_floatx("float64")
    keras.backend.set_epsilon(0.1)
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    keras.saving.get_custom_objects()["Dense"] = dict
    tf.config.run_functions_eagerly(True)
    tf.config.set_soft_device_placement(False)
    os.environ["RAYKERAS_TEST_LEFT"] = "1"
    os.chdir("/")
    sys.path.insert(0, config["folder"])
    importlib.import_module("left_behind").value += 1
    config["folder"] = None


def what_is_left(config: dict[str, Any]) -> dict[str, Any]:
    import tensorflow as tf

    keras = importlib.import_module(config["package"])
    return {
        "floatx": keras.backend.floatx(),
        "epsilon": keras.backend.epsilon(),
        "policy": keras.mixed_precision.global_policy().name,
        "object": "Dense" in keras.saving.get_custom_objects(),
        "eager": tf.config.functions_run_eagerly(),
        "placement": tf.config.get_soft_device_placement(),
        "environment": "RAYKERAS_TEST_LEFT" in os.environ,
        "folder": os.getcwd(),
        "path": config["folder"] in sys.path,
        "module": "left_behind" in sys.modules,
    }


@PACKAGES
def test_nothing_of_a_call_reaches_the_next(package: str, tmp_path: Path) -> None:
    from raykeras.compat.keras_api import KerasAPI

    (tmp_path / "left_behind.py").write_text("value = 0")
    pids, api = workers(tmp_path), KerasAPI(package)
    config = {"package": package, "folder": str(tmp_path)}
    before = run_on_workers(what_is_left, config, scale=TWO, cpus_per_worker=1.0, api=api)
    run_on_workers(change_everything, config, scale=TWO, cpus_per_worker=1.0, api=api)
    assert run_on_workers(what_is_left, config, scale=TWO, cpus_per_worker=1.0, api=api) == before
    run = rk.Run(storage=str(tmp_path / "runs"))
    history = rk.fit(dense(package), X, Y, scale=TWO, run=run, **OPTIONS).history
    assert workers(tmp_path) == pids
    model = _seeded(package)
    expected = model.fit(X, Y, **OPTIONS).history
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)


def _seeded(package: str) -> Any:
    importlib.import_module(package).utils.set_random_seed(0)
    return dense(package)()


def constant_of_module(config: dict[str, Any]) -> int:
    sys.path.insert(0, config["folder"])
    return int(importlib.import_module("edited").CONSTANT)


def test_module_that_the_user_edits_is_imported_again(tmp_path: Path) -> None:
    pids = workers(tmp_path)
    for constant in (1, 22):
        (tmp_path / "edited.py").write_text(f"CONSTANT = {constant}")
        config = {"folder": str(tmp_path)}
        assert run_on_workers(constant_of_module, config, scale=TWO, cpus_per_worker=1.0) == constant
    assert workers(tmp_path) == pids


def fail(config: dict[str, Any]) -> None:
    import ray.train

    if ray.train.get_context().get_world_rank() in config["ranks"]:
        raise rk.ModelError("as told")
    time.sleep(600)


@pytest.mark.parametrize("ranks", [(0, 1), (1,)], ids=["all", "one"])
def test_workers_stay_up_after_an_error_of_all(ranks: tuple[int, ...], tmp_path: Path) -> None:
    pids = workers(tmp_path)
    with pytest.raises(rk.ModelError, match="as told"):
        run_on_workers(fail, {"ranks": ranks}, scale=TWO, cpus_per_worker=1.0)
    if len(ranks) == 2:
        assert workers(tmp_path) == pids
    else:
        wait_until(lambda: not any(map(exists, pids)))


def test_killed_idle_worker_is_replaced(tmp_path: Path) -> None:
    pids = workers(tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    assert not set(workers(tmp_path)) & set(pids)


def test_idle_workers_end_in_time(tmp_path: Path) -> None:
    pids = workers(tmp_path, rk.Scale(workers=2, idle_timeout_s=1))
    assert all(map(exists, pids))
    wait_until(lambda: not any(map(exists, pids)))


def test_idle_workers_end_if_others_wait_for_their_resources(tmp_path: Path) -> None:
    import ray

    pids, actor = workers(tmp_path), ray.remote(num_cpus=ray.cluster_resources()["CPU"])(_Actor).remote()
    assert ray.get(actor.ready.remote(), timeout=60)
    wait_until(lambda: not any(map(exists, pids)))
    ray.kill(actor)


class _Actor:
    def ready(self) -> bool:
        return True


@pytest.mark.exhaustive
def test_workers_of_another_scale_get_the_resources(tmp_path: Path) -> None:
    pids = workers(tmp_path)
    other = workers(tmp_path, rk.Scale(workers=2, replicas_per_worker=2))
    assert not set(other) & set(pids)
    wait_until(lambda: not any(map(exists, pids)))
    worker_pool.prepare(rk.Scale(workers=3), 1.0)
    wait_until(lambda: not any(map(exists, other)))
