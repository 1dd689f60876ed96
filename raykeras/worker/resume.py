"""Resume a training in the middle of an epoch, through Keras' `fit`.

The callbacks see nothing of the interruption: hooks, batch numbers and logs continue, metrics keep their state, and the
epoch ends where it would have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from raykeras.checkpoint.serialization import NotSerializableError, from_json, to_json
from raykeras.compat.keras_api import KerasAPI

_Arrays = dict[str, np.ndarray]

_BATCH_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_test_batch_begin", "on_test_batch_end")


class CallbackStates:
    """The serializable attributes of callbacks that change in training.

    Attributes that do not change are not saved, so that the user may choose other values for a resumed run.

    Args:
        callbacks: Callbacks by name, before training.
        skip: Maps a callback and an attribute's name to whether the attribute is not state.
    """

    def __init__(self, callbacks: Mapping[str, Any], skip: Callable[[Any, str], bool]) -> None:
        self._callbacks, self._skip = callbacks, skip
        self._initial = {name: self._serialized(callback) for name, callback in callbacks.items()}

    def changed(self) -> dict[str, dict[str, Any]]:
        """Return the changed attributes of each callback, by name."""
        return {name: self._changed(name, callback) for name, callback in self._callbacks.items()}

    def restore_states(self, changed: Mapping[str, Mapping[str, Any]]) -> None:
        """Set changed attributes on the callbacks of the same names.

        Args:
            changed: As `changed` returned it. It may come from an untrusted file: methods are not replaced.
        """
        for name, callback in self._callbacks.items():
            for key, value in changed.get(name, {}).items():
                if not self._skip(callback, key) and not callable(getattr(type(callback), key, None)):
                    vars(callback)[key] = value

    def _changed(self, name: str, callback: Any) -> dict[str, Any]:
        initial = self._initial[name]
        current = self._serialized(callback)
        return {key: from_json(*value) for key, value in current.items() if not _same(value, initial.get(key))}

    def _serialized(self, callback: Any) -> dict[str, tuple[Any, _Arrays]]:
        serialized = {}
        for key, value in vars(callback).items():
            arrays: _Arrays = {}
            if not self._skip(callback, key):
                try:
                    serialized[key] = (to_json(value, arrays, key), arrays)
                except NotSerializableError:
                    continue
        return serialized


def resuming_list(
    api: KerasAPI,
    callbacks: list[Any],
    model: Any,
    *,
    params: Mapping[str, Any],
    steps_of: Callable[[int], int | None],
    epoch: int,
    step: int,
    is_over: bool,
    counts: bool,
    restore_states: Callable[[], None],
    restore_metrics: Callable[[], None],
    logs: Mapping[str, Any],
) -> Any:
    """Return the `CallbackList` for `fit(initial_epoch=epoch)`.

    Args:
        api: The model's Keras package.
        callbacks: All callbacks, in the order in which they are called.
        model: The model being trained.
        params: As Keras passes them to callbacks.
        steps_of: Maps an epoch to its number of steps; to None if unknown.
        epoch: The first epoch.
        step: Number of steps of the first epoch that are done; 0 to begin the epoch.
        is_over: Whether the first epoch has no more steps, although it had fewer than others.
        counts: Whether to end epochs here, because Keras does not know their number of steps.
        restore_states: Called when all callbacks have begun training; sets their attributes.
        restore_metrics: Called where the first epoch would begin, when Keras has reset the metrics.
        logs: Logs of the last step that is done.
    """

    base: Any = api.module.callbacks.CallbackList

    # also a list, because code that overrides or patches `Model.fit` may append to what is a list in Keras
    class Resuming(base, list):
        def __init__(self) -> None:
            base.__init__(self, callbacks, add_history=False, add_progbar=False, model=model, **params)
            list.append(self, _forwarding(api, self))
            self._num_steps = steps_of(epoch)
            self._num_before = step  # steps of this epoch before this process
            self._begins_epoch = step == 0
            self._model_function: Any = None  # the model's train function while another one replaces it
            self._stop_training: bool | None = None  # the callbacks' value while this class sets it to end an epoch
            self._quick_hooks = {hook: api.quick_hooks(callbacks, hook) for hook in _BATCH_HOOKS}

        def __iter__(self) -> Iterator[Any]:
            return list.__iter__(self)  # tf_keras' class defines it too

        def _call(self, hook: str, batch: int, logs: Any) -> None:
            """Call a hook of all callbacks; wait for the step's logs only if a callback reads them."""
            quick = self._quick_hooks[hook]
            if quick is None:
                getattr(super(), hook)(batch, logs)
            else:
                for function in quick:
                    function(batch, logs)

        def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
            self._call("on_test_batch_begin", batch, logs)

        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            self._call("on_test_batch_end", batch, logs)

        def on_train_begin(self, logs: Any = None) -> None:
            super().on_train_begin(logs)
            restore_states()
            if is_over or (step and step == self._num_steps):  # only the end of the epoch is left
                self._model_function = self.model.train_function
                self.model.train_function = lambda iterator: dict(last_logs)

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._num_steps = steps_of(epoch)
            if self._begins_epoch:
                super().on_epoch_begin(epoch, logs)
            else:
                restore_metrics()
            self._begins_epoch = True

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if self._model_function is None:
                self._limit_execution(batch)
                self._call("on_train_batch_begin", batch + self._num_before, logs)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if self._model_function is not None:
                self.model.train_function, self._model_function = self._model_function, None
                self._end_epoch()
                self._stop_training = is_over
                return
            batch += self._num_before
            if api.is_legacy and self._num_steps is not None:
                batch = min(batch, self._num_steps - 1)
            self._call("on_train_batch_end", batch, logs)
            if (self._num_before or counts) and self._num_steps is not None and batch + 1 >= self._num_steps:
                self._end_epoch()

        def _limit_execution(self, batch: int) -> None:
            """Limit an execution of tf_keras to the steps left; for Keras 3 see `raykeras.distribute.executions`."""
            if (
                api.is_legacy
                and steps_per_execution > 1
                and (self._num_before or counts)
                and self._num_steps is not None
            ):
                left = self._num_steps - batch - self._num_before
                self.model._steps_per_execution.assign(min(steps_per_execution, left))

        def _end_epoch(self) -> None:
            """End Keras' loop over steps, which counts all steps of an epoch and not those that are left."""
            self._stop_training, self.model.stop_training = self.model.stop_training, True

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if self._stop_training is not None:
                self.model.stop_training, self._stop_training = self._stop_training, None
                if api.is_legacy:
                    self.model._steps_per_execution.assign(steps_per_execution)
            self._num_before = 0
            super().on_epoch_end(epoch, logs)

    last_logs = dict(logs)
    steps_per_execution = api.steps_per_execution(model)
    return Resuming()


def _forwarding(api: KerasAPI, callbacks: Any) -> Any:
    """Return a callback that calls the hooks of a `CallbackList`."""
    kind = api.module.callbacks.Callback
    hooks = {name for name in vars(kind) if name.startswith("on_")} - {"on_batch_begin", "on_batch_end"}

    def forward(hook: str) -> Callable[..., None]:
        return lambda self, *args, **kwargs: getattr(callbacks, hook)(*args, **kwargs)

    methods = {hook: forward(hook) for hook in hooks}
    return type("Forwarding", (kind,), {**methods, "_supports_tf_logs": True})()


def _same(one: tuple[Any, _Arrays], other: tuple[Any, _Arrays] | None) -> bool:
    if other is None or one[0] != other[0] or set(one[1]) != set(other[1]):
        return False
    return all(array.dtype == other[1][k].dtype and np.array_equal(array, other[1][k]) for k, array in one[1].items())
