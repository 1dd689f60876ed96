"""Undocumented attributes of Keras' callbacks."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")

PATH_ATTRIBUTES = (
    "filepath",
    "filename",
    "log_dir",
    "backup_dir",
    "_weights_path",
    "_training_metadata_path",
    "_prev_weights_path",
    "_prev_training_metadata_path",
)
"""Attributes that hold the path of a file or folder to which a callback writes."""

FIT_ATTRIBUTES = ("model", "_model", "params", "_train_step", "_val_step", "_writers", "summary")
"""Attributes that Keras sets when `fit` begins; a callback that was used before still has them."""

INSTANCE_NAMES = (
    "keras.callbacks.BackupAndRestore._weights_path",
    "keras.callbacks.BackupAndRestore._training_metadata_path",
    "keras.callbacks.BackupAndRestore._prev_weights_path",
    "keras.callbacks.BackupAndRestore._prev_training_metadata_path",
    "keras.callbacks.Callback._model",
    "tf_keras.callbacks.TensorBoard._train_step",
    "tf_keras.callbacks.TensorBoard._val_step",
    "keras.callbacks.TensorBoard._writers",
    "tf_keras.callbacks.History._supports_tf_logs",
)
"""Attributes of instances that this module names."""


def as_callback_class(api: Any, hooks: type) -> Any:
    """Return a class of hooks as a callback class of a Keras package, whose hooks accept tensors in `logs`.

    Args:
        api: The `KerasAPI`.
        hooks: A class that defines hooks, and whose base class is `Callback` for type checkers only.
    """
    return type(hooks.__name__, (hooks, api.module.callbacks.Callback), {"_supports_tf_logs": True})


def accepting_tensors(callback: T) -> T:
    """Return a callback, marked as accepting tensors in `logs`; Keras would wait for each step to pass numbers."""
    callback._supports_tf_logs = True  # type: ignore[attr-defined]
    return callback


def accepts_tensors(callback: Any) -> bool:
    """Return whether a callback is marked as accepting tensors in `logs`."""
    return bool(getattr(callback, "_supports_tf_logs", False))
