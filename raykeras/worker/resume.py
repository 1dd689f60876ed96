"""Resume training in the middle of an epoch, through Keras' `fit`.

Callbacks do not notice the interruption: hooks, batch numbers and logs continue, metrics keep their state, and the
epoch ends where it would have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from raykeras.checkpoint.serialization import NotSerializableError, from_json, to_json
from raykeras.compat.keras_api import KerasAPI
from raykeras.compat.keras_callbacks import accepting_tensors

if TYPE_CHECKING:
    from keras.callbacks import CallbackList as _CallbackList
else:
    _CallbackList = object

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


class ResumableTraining(Protocol):
    """What a resuming list of callbacks needs from a training."""

    @property
    def params(self) -> Mapping[str, Any]:
        """As Keras passes them to callbacks."""

    def steps_of(self, epoch: int) -> int | None:
        """Return the number of steps of an epoch; None if unknown."""

    def restore_states(self) -> None:
        """Set the attributes of callbacks, which have all begun training."""

    def restore_metrics(self) -> None:
        """Set the metrics' variables, which Keras has reset."""


@dataclass(frozen=True)
class EpochStart:
    """Where the first epoch of a training begins.

    Attributes:
        epoch: The first epoch.
        step: Number of its steps that are done; 0 to begin the epoch.
        is_over: Whether the epoch has no more steps, although it had fewer than others.
        logs: Logs of the last step that is done.
    """

    epoch: int
    step: int
    is_over: bool = False
    logs: Mapping[str, Any] = field(default_factory=dict)


def resuming_list(
    api: KerasAPI,
    callbacks: list[Any],
    model: Any,
    training: ResumableTraining,
    start: EpochStart,
    counts_steps: bool,
) -> Any:
    """Return the `CallbackList` for `fit(initial_epoch=start.epoch)`.

    Args:
        api: The model's Keras package.
        callbacks: All callbacks, in the order in which they are called.
        model: The model being trained.
        training: Restores what Keras resets.
        start: Where the first epoch begins.
        counts_steps: Whether to end epochs here, because Keras does not know their number of steps.
    """
    # also a list, because code that overrides or patches `Model.fit` may append to what is a list in Keras
    bases = (_ResumingList, api.module.callbacks.CallbackList, list)
    return type("ResumingList", bases, {})(api, callbacks, model, training, start, counts_steps)


class _ResumingList(_CallbackList):
    """Calls the hooks of callbacks as if the training had not been interrupted."""

    def __init__(
        self,
        api: KerasAPI,
        callbacks: list[Any],
        model: Any,
        training: ResumableTraining,
        start: EpochStart,
        counts_steps: bool,
    ) -> None:
        super().__init__(callbacks, add_history=False, add_progbar=False, model=model, **training.params)
        list.append(self, _forwarding(api, self))
        self._api, self._training, self._start, self._counts_steps = api, training, start, counts_steps
        self._num_steps = training.steps_of(start.epoch)
        self._num_before = start.step  # steps of this epoch before this process
        self._begins_epoch = start.step == 0
        self._model_function: Any = None  # the model's train function while another one replaces it
        self._stop_training: bool | None = None  # the callbacks' value while this class sets it to end an epoch
        self._find_direct_hooks()
        self._steps_per_execution = api.steps_per_execution(model)

    def append(self, callback: Any) -> None:
        """Add a callback, as code that patches `Model.fit` does."""
        callback.set_params(self.params)
        callback.set_model(self.model)
        self.callbacks.append(callback)
        self._find_direct_hooks()

    def __iter__(self) -> Iterator[Any]:
        return list.__iter__(self)  # tf_keras' class defines it too

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._call("on_test_batch_begin", batch, logs)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self._call("on_test_batch_end", batch, logs)

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self._training.restore_states()
        start = self._start
        if start.is_over or (start.step and start.step == self._num_steps):  # only the end of the epoch is left
            self._model_function = self.model.train_function
            self.model.train_function = lambda iterator: dict(start.logs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._num_steps = self._training.steps_of(epoch)
        if self._begins_epoch:
            super().on_epoch_begin(epoch, logs)
        else:
            self._training.restore_metrics()
        self._begins_epoch = True

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._model_function is None:
            self._limit_execution(batch)
            self._call("on_train_batch_begin", batch + self._num_before, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._model_function is not None:
            self.model.train_function, self._model_function = self._model_function, None
            self._end_epoch()
            self._stop_training = self._start.is_over
            return
        batch += self._num_before
        if not self._api.compiles_executions and self._num_steps is not None:
            batch = min(batch, self._num_steps - 1)
        self._call("on_train_batch_end", batch, logs)
        if self._ends_epochs and self._num_steps is not None and batch + 1 >= self._num_steps:
            self._end_epoch()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._stop_training is not None:
            self.model.stop_training, self._stop_training = self._stop_training, None
            if not self._api.compiles_executions:
                self.model.steps_per_execution.assign(self._steps_per_execution)
        self._num_before = 0
        super().on_epoch_end(epoch, logs)

    @property
    def _ends_epochs(self) -> bool:
        """Whether Keras, which counts the steps of a whole epoch, would go beyond this one."""
        return bool(self._num_before) or self._counts_steps

    def _find_direct_hooks(self) -> None:
        self._direct_hooks = {hook: self._api.direct_hooks(self.callbacks, hook) for hook in _BATCH_HOOKS}

    def _call(self, hook: str, batch: int, logs: Any) -> None:
        """Call a hook of all callbacks; wait for the step's logs only if a callback reads them."""
        direct = self._direct_hooks[hook]
        if direct is None:
            getattr(super(), hook)(batch, logs)
        else:
            for function in direct:
                function(batch, logs)

    def _limit_execution(self, batch: int) -> None:
        """Limit an execution to the steps left, unless it is compiled; see `raykeras.distribute.executions`."""
        if self._api.compiles_executions or self._steps_per_execution == 1:
            return
        if self._ends_epochs and self._num_steps is not None:
            left = self._num_steps - batch - self._num_before
            self.model.steps_per_execution.assign(min(self._steps_per_execution, left))

    def _end_epoch(self) -> None:
        """End Keras' loop over steps."""
        self._stop_training, self.model.stop_training = self.model.stop_training, True


def _forwarding(api: KerasAPI, callbacks: Any) -> Any:
    """Return a callback that calls the hooks of a `CallbackList`."""
    kind = api.module.callbacks.Callback
    hooks = {name for name in vars(kind) if name.startswith("on_")} - {"on_batch_begin", "on_batch_end"}

    def forward(hook: str) -> Callable[..., None]:
        return lambda self, *args, **kwargs: getattr(callbacks, hook)(*args, **kwargs)

    methods = {hook: forward(hook) for hook in hooks}
    return accepting_tensors(type("Forwarding", (kind,), methods)())


def _same(one: tuple[Any, _Arrays], other: tuple[Any, _Arrays] | None) -> bool:
    if other is None or one[0] != other[0] or set(one[1]) != set(other[1]):
        return False
    return all(array.dtype == other[1][k].dtype and np.array_equal(array, other[1][k]) for k, array in one[1].items())
