"""How TensorFlow is imported and configured before it starts."""

from __future__ import annotations

import glob
import os
import subprocess
import sys
import textwrap

import pytest

from tests.support.fork_server import ForkServer


def test_importing_tensorflow_restores_garbage_collector() -> None:
    """In a new interpreter; see also `tests/unit/compat/test_quiet.py`."""
    script = """
    import gc
    from raykeras.compat.quiet import import_tensorflow
    collections = lambda: sum(generation["collections"] for generation in gc.get_stats())
    done = collections()
    import_tensorflow()
    assert collections() - done < 10  # 900 otherwise
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert len(gc.get_objects(generation=2)) > 100_000  # which is rarely collected
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def check_idle_threads(started_by: str) -> None:
    """Make a strategy after the user ran or configured TensorFlow; check its configuration."""
    import tensorflow as tf
    from tensorflow.core.protobuf.config_pb2 import ConfigProto
    from tensorflow.python.eager.context import context

    from raykeras.core.config import Scale
    from raykeras.distribute.strategy import make_strategy

    tf.config.threading.set_inter_op_parallelism_threads(2)
    if started_by == "an operation":
        tf.constant(1)
    if started_by == "a configuration":
        context()._config = ConfigProto(inter_op_parallelism_threads=3)
    replicas = 1 if context()._initialized else 2
    make_strategy(Scale(replicas_per_worker=replicas))
    assert tf.reduce_sum(tf.ones((3, 4))) == 12
    assert len(tf.config.list_logical_devices("CPU")) == replicas
    assert context().config.inter_op_parallelism_threads == 2
    assert context().config.experimental.disable_thread_spinning == (started_by == "nothing")


@pytest.mark.parametrize("started_by", ["nothing", "an operation", "a configuration"])
def test_idle_threads_sleep_unless_user_configured_tensorflow(started_by: str, forked: ForkServer) -> None:
    ended = forked.run(check_idle_threads, started_by)
    assert ended.exit_code == 0, ended.output


def too_few_gpus(hidden: str) -> None:
    from raykeras.core.config import Scale
    from raykeras.distribute.strategy import make_strategy

    os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    make_strategy(Scale(gpus_per_worker=2))


def test_missing_gpus_are_explained(forked: ForkServer) -> None:
    ended = forked.run(too_few_gpus, "")
    assert "`gpus_per_worker=2` must see that many GPUs; TensorFlow sees " in ended.output
    num_devices = len(glob.glob("/dev/nvidia[0-9]*"))
    remedy = {0: "install NVIDIA's driver", 1: "pass a smaller `gpus_per_worker`"}
    assert remedy.get(num_devices, "CUDA_VISIBLE_DEVICES is ''") in ended.output
