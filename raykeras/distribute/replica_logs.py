"""Reduce the logs of a step on several replicas: metrics count the rows of all, other values are averaged.

Keras 3 fails to reduce scalars with several workers, and tf_keras sums them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from raykeras.compat.patch import patched_method


class ReplicaLogs:
    """Reduces the logs of one model's steps.

    Args:
        model: The model; `get_metrics_result` of this object must replace the model's.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._get_metrics_result = model.get_metrics_result
        self._has_metrics_result = False  # whether the traced step called `get_metrics_result`
        self._results: list[tuple[Any, Callable[[], Any]]] = []  # a replica's value, and what merges all replicas'

    def get_metrics_result(self) -> Any:
        """Return the model's results, and note that the step's logs hold them."""
        self._has_metrics_result = True
        return self._get_metrics_result()

    def record_results(self, stack: contextlib.ExitStack) -> None:
        """Record what metrics return to a custom step, so that its logs are recognized as metrics.

        Args:
            stack: Undoes the patches when it closes.
        """
        for metric in self._model.metrics:
            stack.enter_context(patched_method(metric, "result", self._recorded(metric.result)))

    def reduced(self, values: Mapping[str, Any], strategy: Any) -> dict[str, Any]:
        """Return one value for each log.

        Args:
            values: Name to the values of all replicas.
            strategy: The `tf.distribute.Strategy`.
        """
        metrics, has_metrics_result = self._get_metrics_result(), self._has_metrics_result
        self._has_metrics_result = False
        results, self._results = self._results, []
        if not has_metrics_result and set(metrics) != set(values):
            metrics = {}  # a log of a custom step may have the name of a metric
            for name, value in values.items():
                local = strategy.experimental_local_results(value)
                merged = next((merged for result, merged in results if result is local[0]), None)
                metrics |= {} if merged is None else {name: merged()}
        return {
            name: metrics[name] if name in metrics else strategy.reduce("MEAN", value, axis=None)
            for name, value in values.items()
        }

    def _recorded(self, result: Callable[[], Any]) -> Callable[[], Any]:
        """Return a metric's `result` that also records what it returns on a replica."""

        def recorded() -> Any:
            value = result()
            if tf.distribute.in_cross_replica_context():
                return value
            if isinstance(value, Mapping):
                self._results += [(item, functools.partial(_result_item, result, name)) for name, item in value.items()]
            else:
                self._results.append((value, result))
            return value

        return recorded


def _result_item(result: Callable[[], Mapping[str, Any]], name: str) -> Any:
    return result()[name]
