"""What TensorFlow is told before it starts."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

CONFIGURED = "context()._config = ConfigProto(inter_op_parallelism_threads=3)"


@pytest.mark.parametrize(
    ("before", "rest"),
    [("pass", True), ("tf.constant(1)", False), (CONFIGURED, False)],
    ids=["fresh", "started by the user", "configured by the user"],
)
def test_threads_that_wait_rest_where_tensorflow_is_left_to_us(before: str, rest: bool) -> None:
    script = f"""
    import tensorflow as tf
    from tensorflow.core.protobuf.config_pb2 import ConfigProto
    from tensorflow.python.eager.context import context
    from raykeras.options import Scale
    from raykeras.strategy import make_strategy
    tf.config.threading.set_inter_op_parallelism_threads(2)
    {before}
    replicas = 1 if context()._initialized else 2
    make_strategy(Scale(replicas_per_worker=replicas))
    assert tf.reduce_sum(tf.ones((3, 4))) == 12
    assert len(tf.config.list_logical_devices("CPU")) == replicas
    assert context().config.inter_op_parallelism_threads == 2
    assert context().config.experimental.disable_thread_spinning == {rest}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
