"""The logs of a step on several replicas: metrics count the rows of all, other logs are averaged.

Both Keras reduce them otherwise: Keras 3 fails for scalars on several workers, and tf_keras adds them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from raykeras.patching import replaced_method


class ReplicaLogs:
    """Reduces the logs of one model's steps.

    Args:
        model: Its `get_metrics_result` must be replaced by that of this object.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._get_metrics_result = model.get_metrics_result
        self._is_asked = False  # by the step that is traced
        self._results: list[tuple[Any, Callable[[], Any]]] = []  # of a replica, and what gives that of all

    def get_metrics_result(self) -> Any:
        """Return the model's, and note that a step's logs hold them."""
        self._is_asked = True
        return self._get_metrics_result()

    def note_results(self, stack: contextlib.ExitStack) -> None:
        """Note what metrics return to a step of the user's own, so that it is known again in its logs.

        Args:
            stack: Until it is closed.
        """
        for metric in self._model.metrics:
            stack.enter_context(replaced_method(metric, "result", self._noting(metric.result)))

    def _noting(self, result: Callable[[], Any]) -> Callable[[], Any]:
        def noted() -> Any:
            value = result()
            if tf.distribute.in_cross_replica_context():
                return value
            if isinstance(value, Mapping):
                self._results += [(part, functools.partial(_of, result, name)) for name, part in value.items()]
            else:
                self._results.append((value, result))
            return value

        return noted

    def reduced(self, values: Mapping[str, Any], strategy: Any) -> dict[str, Any]:
        """Return one value for each log.

        Args:
            values: Name to the values of all replicas.
            strategy: The `tf.distribute.Strategy`.
        """
        metrics, was_asked, self._is_asked = self._get_metrics_result(), self._is_asked, False
        results, self._results = self._results, []
        if not was_asked and set(metrics) != set(values):
            metrics = {}  # a log of the user's own may be called like a metric
            for name, value in values.items():
                local = strategy.experimental_local_results(value)
                merged = next((merged for result, merged in results if result is local[0]), None)
                metrics |= {} if merged is None else {name: merged()}
        return {
            name: metrics[name] if name in metrics else strategy.reduce("MEAN", value, axis=None)
            for name, value in values.items()
        }


def _of(result: Callable[[], Mapping[str, Any]], name: str) -> Any:
    return result()[name]
