"""A training that goes on in the middle of an epoch, through Keras' own `fit`.

Enters: what `raykeras.snapshot` restored. Leaves: a `CallbackList` for `fit`, by which the callbacks see nothing of
the interruption: hooks, numbers of batches and logs go on, the metrics count on, and the epoch ends where it would
have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from raykeras.keras_api import KerasAPI
from raykeras.plain import NotPlainError, from_plain, to_plain

_ARRAYS = dict[str, np.ndarray]
_BATCH_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_test_batch_begin", "on_test_batch_end")


class CallbackStates:
    """The attributes of callbacks that change in training, as far as they are plain.

    What stays as the user made it is not kept, so that it may be made otherwise for a resumed run.

    Args:
        callbacks: By a name for each; not trained with yet.
        skip: Attributes that are not state, and classes whose instances have none.
    """

    def __init__(self, callbacks: Mapping[str, Any], skip: Callable[[Any, str], bool]) -> None:
        self._callbacks, self._skip = callbacks, skip
        self._initial = {name: self._plain(callback) for name, callback in callbacks.items()}

    def changed(self) -> dict[str, dict[str, Any]]:
        """Name of the callback to its changed attributes."""
        return {name: self._changed(name, callback) for name, callback in self._callbacks.items()}

    def _changed(self, name: str, callback: Any) -> dict[str, Any]:
        initial = self._initial[name]
        now = self._plain(callback)
        return {key: from_plain(*value) for key, value in now.items() if not _same(value, initial.get(key))}

    def _plain(self, callback: Any) -> dict[str, tuple[Any, _ARRAYS]]:
        found = {}
        for key, value in vars(callback).items():
            arrays: _ARRAYS = {}
            if not self._skip(callback, key):
                try:
                    found[key] = (to_plain(value, arrays, key), arrays)
                except NotPlainError:
                    continue
        return found

    def put_back(self, changed: Mapping[str, Mapping[str, Any]]) -> None:
        """Set what `changed` returned on callbacks of the same names; the file that held it may be anybody's."""
        for name, callback in self._callbacks.items():
            for key, value in changed.get(name, {}).items():
                if not self._skip(callback, key) and not callable(getattr(type(callback), key, None)):
                    vars(callback)[key] = value


def _same(one: tuple[Any, _ARRAYS], other: tuple[Any, _ARRAYS] | None) -> bool:
    if other is None or one[0] != other[0] or set(one[1]) != set(other[1]):
        return False
    return all(array.dtype == other[1][k].dtype and np.array_equal(array, other[1][k]) for k, array in one[1].items())


def _forwarding(api: KerasAPI, callbacks: Any) -> Any:
    """Return a callback that calls the hooks of a `CallbackList`."""
    kind = api.module.callbacks.Callback
    hooks = {name for name in vars(kind) if name.startswith("on_")} - {"on_batch_begin", "on_batch_end"}

    def forward(hook: str) -> Callable[..., None]:
        return lambda self, *args, **kwargs: getattr(callbacks, hook)(*args, **kwargs)

    names = {hook: forward(hook) for hook in hooks}
    return type("Forwarding", (kind,), {**names, "_supports_tf_logs": True})()


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
    put_back: Callable[[], None],
    put_metrics_back: Callable[[], None],
    logs: Mapping[str, Any],
) -> Any:
    """The `CallbackList` for `fit(initial_epoch=...)`.

    Args:
        api: Keras.
        callbacks: All that are called, in order.
        model: What is trained.
        params: As Keras gives them to callbacks.
        steps_of: Epoch to its steps; to None where nobody knows them.
        epoch: The first.
        step: Steps of the first epoch that were done before; 0 for an epoch that begins.
        is_over: Whether the first epoch has no more steps, though it had fewer than others.
        counts: Whether Keras does not know how many steps an epoch has, but we do.
        put_back: Called when all callbacks have begun; sets their attributes.
        put_metrics_back: Called where the first epoch would begin; the metrics are reset then.
        logs: Of the last step that was done.
    """

    base: Any = api.module.callbacks.CallbackList

    # also a list, since who overrides or patches `Model.fit` may add to what is one in Keras
    class Resuming(base, list):
        def __init__(self) -> None:
            base.__init__(self, callbacks, add_history=False, add_progbar=False, model=model, **params)
            list.append(self, _forwarding(api, self))
            self._steps = steps_of(epoch)
            self._done = step  # steps that this epoch had before this process came to it
            self._begins = step == 0
            self._train: Any = None  # the model's own function, while another stands in for it
            self._wanted: bool | None = None
            self._hooks = {hook: api.quick_hooks(callbacks, hook) for hook in _BATCH_HOOKS}

        def __iter__(self) -> Iterator[Any]:
            return list.__iter__(self)  # tf_keras' class has one, too

        def _call(self, hook: str, batch: int, logs: Any) -> None:
            """Calls all callbacks' hook, and waits for the step's logs only if one of them reads them."""
            quick = self._hooks[hook]
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
            put_back()
            if is_over or (step and step == self._steps):  # nothing but what follows the last step is left
                self._train, self.model.train_function = self.model.train_function, lambda iterator: dict(last_logs)

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._steps = steps_of(epoch)
            if self._begins:
                super().on_epoch_begin(epoch, logs)
            else:
                put_metrics_back()
            self._begins = True

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if self._train is None:
                self._execute(batch)
                self._call("on_train_batch_begin", batch + self._done, logs)

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if self._train is not None:
                self.model.train_function, self._train = self._train, None
                self._end_epoch()
                self._wanted = is_over
                return
            batch += self._done
            if api.is_legacy and self._steps is not None:
                batch = min(batch, self._steps - 1)
            self._call("on_train_batch_end", batch, logs)
            if (self._done or counts) and self._steps is not None and batch + 1 >= self._steps:
                self._end_epoch()

        def _execute(self, batch: int) -> None:
            """Lets tf_keras execute no more steps at once than are left; for Keras 3 see `raykeras.executions`."""
            if api.is_legacy and executed > 1 and (self._done or counts) and self._steps is not None:
                left = self._steps - batch - self._done
                self.model._steps_per_execution.assign(min(executed, left))

        def _end_epoch(self) -> None:
            """Lets Keras leave its loop over steps; it knows of all the epoch's steps, not of those left."""
            self._wanted, self.model.stop_training = self.model.stop_training, True

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if self._wanted is not None:
                self.model.stop_training, self._wanted = self._wanted, None
                if api.is_legacy:
                    self.model._steps_per_execution.assign(executed)
            self._done = 0
            super().on_epoch_end(epoch, logs)

    last_logs = dict(logs)
    executed = api.steps_per_execution(model)
    return Resuming()
