"""TensorFlow's optimizer of graphs, which takes a fifth of the CPU time of training the small models of tests."""

from __future__ import annotations

from typing import Any


def skip_graph_optimization() -> None:
    """Run the functions that are traced from now on as they were traced.

    Processes that a test starts itself, and the benchmarks, optimize graphs as usual.
    """
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


def skip_graph_optimization_on_worker(config: dict[str, Any]) -> None:
    """Do the same on a worker, for all its jobs."""
    skip_graph_optimization()
