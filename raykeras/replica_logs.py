"""The logs of a step on several replicas: metrics count the rows of all, other logs are averaged.

Both Keras reduce them otherwise: Keras 3 fails for scalars on several workers, and tf_keras adds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ReplicaLogs:
    """Reduces the logs of one model's steps.

    Args:
        model: Its `get_metrics_result` must be replaced by that of this object.
    """

    def __init__(self, model: Any) -> None:
        self._get_metrics_result = model.get_metrics_result
        self._is_asked = False  # by the step that is traced

    def get_metrics_result(self) -> Any:
        """Return the model's, and note that a step's logs hold them."""
        self._is_asked = True
        return self._get_metrics_result()

    def reduced(self, values: Mapping[str, Any], strategy: Any) -> dict[str, Any]:
        """Return one value for each log.

        Args:
            values: Name to the values of all replicas.
            strategy: The `tf.distribute.Strategy`.
        """
        metrics, was_asked, self._is_asked = self._get_metrics_result(), self._is_asked, False
        if not was_asked and set(metrics) != set(values):
            metrics = {}  # a log of the user's own may be called like a metric
        return {
            name: metrics[name] if name in metrics else strategy.reduce("MEAN", value, axis=None)
            for name, value in values.items()
        }
