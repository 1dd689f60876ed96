"""Private names of Keras 3's `TensorFlowTrainer`."""

from __future__ import annotations

from typing import Any


def is_countable(model: Any) -> bool:
    """Return whether Keras' own functions run the steps of a model, not functions that its class overrides."""
    from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

    methods = ("make_train_function", "make_test_function")
    return all(getattr(type(model), method, None) is getattr(TensorFlowTrainer, method) for method in methods)
