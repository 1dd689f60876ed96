"""Compare a run of raykeras with training in plain Keras."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import raykeras as rk


def assert_same_training(
    result: rk.Result,
    history: Mapping[str, Sequence[float]],
    model: Any,
    *,
    ignored: Sequence[str] = (),
    message: str = "",
) -> None:
    """Assert that a run has the history and the weights of plain `Model.fit`.

    Args:
        result: The result of `rk.fit`.
        history: `History.history` of plain `Model.fit`.
        model: The model that plain `Model.fit` trained.
        ignored: Names of metrics whose values may differ.
        message: Text to add to the message of a failure.
    """
    assert set(result.history) == set(history)
    for name in set(history) - set(ignored):
        np.testing.assert_allclose(
            result.history[name], history[name], rtol=1e-5, atol=1e-7, err_msg=f"{name} {message}"
        )
    assert_same_weights(result.model(), model, message=message)


def assert_same_weights(
    model: Any, expected: Any, *, rtol: float = 1e-4, atol: float = 1e-6, message: str = ""
) -> None:
    """Assert that two models have the same weights, without the state of metrics that tf_keras counts as weights."""
    for weights, expected_weights in zip(_weights(model), _weights(expected), strict=True):
        np.testing.assert_allclose(weights, expected_weights, rtol=rtol, atol=atol, err_msg=message)


def _weights(model: Any) -> list[np.ndarray]:
    states = {id(variable) for metric in model.metrics for variable in metric.variables}
    return [weight.numpy() for weight in model.weights if id(weight) not in states]
