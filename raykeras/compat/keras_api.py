"""One interface to Keras 3 and tf_keras (Keras 2), which hides their differences."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from raykeras.compat.patch import patched
from raykeras.core.errors import ModelError
from raykeras.core.logs import plain_number
from raykeras.core.structures import is_deep


@dataclass(frozen=True)
class KerasAPI:
    """Keras 3 or tf_keras.

    Attributes:
        name: "keras" or "tf_keras".
    """

    name: str

    @property
    def is_legacy(self) -> bool:
        return self.name == "tf_keras"

    @property
    def module(self) -> ModuleType:
        """The imported package.

        Raises:
            ModelError: tf_keras is not installed.
        """
        try:
            return importlib.import_module(self.name)
        except ModuleNotFoundError as error:
            if error.name != self.name or not self.is_legacy:  # Keras 3 comes with TensorFlow
                raise
            raise ModelError(
                "The package of a model must be installed on every node; this process has no tf_keras. "
                "Install `raykeras[legacy]` on every node."
            ) from None

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def allows_unsafe_deserialization(self) -> bool:
        """Whether `enable_unsafe_deserialization` of the package was called in this process."""
        library = sys.modules.get(f"{self.name}.src.saving.serialization_lib")
        return library is not None and library.in_safe_mode() is False

    def seed(self, seed: int) -> None:
        """Seed Python, NumPy, TensorFlow and the package."""
        self.module.utils.set_random_seed(seed)

    def is_compiled(self, model: Any) -> bool:
        """Return whether a model is compiled."""
        return bool(getattr(model, "_is_compiled", False) if self.is_legacy else getattr(model, "compiled", False))

    def input_shapes(self, model: Any) -> dict[str, tuple[int | None, ...] | None] | None:
        """Return the shape of one row of each input, by the name it is fed under; None where it is unknown."""
        tensors = self._inputs(model)
        return None if tensors is None else {name: _row_shape(tensor) for name, tensor in tensors.items()}

    def is_optional(self, model: Any, name: str) -> bool:
        """Return whether the input that is fed under a name may be None."""
        tensor = (self._inputs(model) or {}).get(name)
        return bool(tensor is not None and getattr(tensor._keras_history[0], "optional", False))

    def _inputs(self, model: Any) -> dict[str, Any] | None:
        inner = _functional(model)
        if not getattr(inner, "inputs", None):
            return None
        struct = getattr(inner, "_nested_inputs" if self.is_legacy else "_inputs_struct", None)
        if is_deep(struct):
            return None
        if isinstance(struct, dict):
            return {str(name): tensor for name, tensor in struct.items()}
        names = inner.input_names if self.is_legacy else [tensor.name for tensor in inner.inputs]
        return {str(name): tensor for name, tensor in zip(names, inner.inputs, strict=True)}

    def output_names(self, model: Any) -> list[str] | None:
        """Return the names under which `y` is fed, in the order of the outputs; None if there are none."""
        inner = _functional(model)
        struct = getattr(inner, "_nested_outputs" if self.is_legacy else "_outputs_struct", None)
        if isinstance(struct, dict):
            names = {id(tensor): str(name) for name, tensor in struct.items()}
            is_unambiguous = not is_deep(struct) and len(names) == len(struct)  # no tensor occurs twice
            return [names[id(tensor)] for tensor in inner.outputs] if is_unambiguous else None
        if not getattr(model, "outputs", None) or getattr(model, "output_names", None) is None:
            return None
        return [str(name) for name in model.output_names]

    def in_order(self, model: Any, logs: dict[str, Any]) -> list[Any]:
        """Return the values of `evaluate(return_dict=True)` in the order of `return_dict=False`."""
        if self.is_legacy:
            names = [name for name in model.metrics_names if name in logs]
            return [plain_number(logs[name]) for name in (*names, *sorted(set(logs) - set(names)))]
        values = model._flatten_metrics_in_order(logs)
        return [plain_number(value) for value in (values if isinstance(values, list) else [values])]

    def steps_per_execution(self, model: Any) -> int:
        """Return the number of steps that the model runs per call of its compiled function."""
        steps = getattr(model, "steps_per_execution", None) or getattr(model, "_steps_per_execution", None) or 1
        return int(steps if isinstance(steps, int) else steps.numpy())

    def quick_hooks(self, callbacks: Sequence[Any], hook: str) -> list[Callable[..., None]] | None:
        """Return the overridden hooks of this name, if all of these callbacks accept tensors in `logs`; else None.

        Keras 3 converts the logs to numbers for every callback, which waits for the step to finish. tf_keras skips
        that for callbacks with `_supports_tf_logs`.
        """
        if self.is_legacy:
            return None
        short = hook.replace("train_", "")  # The default train hooks call this one.
        overriding = [
            callback
            for callback in callbacks
            if not all(getattr(getattr(callback, name), "_is_default", False) for name in {hook, short})
        ]
        if not all(getattr(callback, "_supports_tf_logs", False) for callback in overriding):
            return None
        return [getattr(callback, hook) for callback in overriding]

    def variables(self, model: Any) -> list[Any]:
        """Return the variables of a model and its optimizer, in a fixed order."""
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None:
            return list(model.variables)
        optimizer_variables = optimizer.variables() if callable(optimizer.variables) else optimizer.variables
        return [*model.variables, *optimizer_variables]

    @property
    def saving_lib(self) -> ModuleType:
        """The module of Keras that writes `.keras` files."""
        return importlib.import_module(f"{self.name}.src.saving.saving_lib")

    def metric_variables(self, model: Any) -> list[Any]:
        """Return the variables of all metrics, in a fixed order and without duplicates."""
        variables = [variable for metric in model.metrics for variable in metric.variables]
        return list({id(variable): variable for variable in variables}.values())

    def seed_states(self, model: Any) -> list[Any]:
        """Return the variables with the state of the random number generators, in a fixed order.

        In tf_keras these exist only after `tf_keras.backend.experimental.enable_tf_random_generator()`; otherwise its
        layers use TensorFlow's stateful random operations, whose state cannot be read.
        """
        from tensorflow.python.ops import stateful_random_ops

        states = []
        if self.is_legacy:
            holders = (getattr(layer, "_random_generator", None) for layer in model._flatten_layers())
            generators = [getattr(holder, "_generator", None) for holder in holders]
            states = [generator.state for generator in generators if generator is not None]
        else:
            from keras.src.backend.common import global_state

            states = [v for v in model.variables if v.path.endswith("seed_generator_state")]
            shared = global_state.get_global_attribute("global_seed_generator")
            states += [] if shared is None else [shared.state]
        if stateful_random_ops.global_generator is not None:
            states.append(stateful_random_ops.global_generator.state)
        return states

    def is_plain(self, model: Any, method: str) -> bool:
        """Return whether a model inherits a method from Keras rather than overriding it."""
        owner = next((cls for cls in type(model).__mro__ if method in vars(cls)), None)
        return owner is not None and owner.__module__.split(".")[0] == self.name

    def has_own_steps(self, model: Any) -> bool:
        """Return whether a model overrides `train_step`, `test_step` or `compute_loss`."""
        return not all(self.is_plain(model, method) for method in ("train_step", "test_step", "compute_loss"))

    def has_call(self, model: Any) -> bool:
        """Return whether a model defines `call`; a model with a custom `train_step` need not."""
        return type(model).call is not self.module.Model.call

    @contextlib.contextmanager
    def taken_as_built(self, model: Any) -> Iterator[None]:
        """Mark a model without `call`, which is never built, as built while the block runs.

        Keras saves and loads the weights of built models only.
        """
        if self.has_call(model):
            yield
            return
        with patched(model, "built", True):
            yield

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Let tf_keras load weights under a strategy while the block runs.

        Under a strategy, tf_keras cannot assign HDF5 datasets to the variables of a layer's metrics, only arrays.
        """
        if not self.is_legacy:
            yield
            return
        layer = self.module.layers.Layer
        load = layer.load_own_variables

        def load_arrays(self: Any, store: Any) -> None:
            load(self, {name: np.asarray(store[name]) for name in store})

        with patched(layer, "load_own_variables", load_arrays):
            yield

    def build_symbolically(self, model: Any, batch: Any) -> None:
        """Create all variables of a Keras 3 model, as its `fit` does from the shapes of a batch."""
        if self.has_call(model):
            model._symbolic_build(data_batch=batch)
        else:
            self.build_optimizer(model)

    def build_optimizer(self, model: Any) -> None:
        """Create the optimizer's variables, which Keras otherwise creates in the first step."""
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None or not (model.built or not self.has_call(model)):
            return
        if hasattr(optimizer, "_create_all_weights"):  # tf_keras.optimizers.legacy
            optimizer._create_all_weights(model.trainable_variables)
        elif not getattr(optimizer, "built", getattr(optimizer, "_built", False)):
            optimizer.build(model.trainable_variables)


def _functional(model: Any) -> Any:
    """Return the functional model inside a Keras 3 Sequential; the model itself otherwise."""
    return getattr(model, "_functional", None) or model


def _row_shape(tensor: Any) -> tuple[int | None, ...] | None:
    shape = tensor.shape
    return None if getattr(shape, "rank", 0) is None else tuple(shape)[1:]


def api_of(model: Any) -> KerasAPI:
    """Return the package that a model's class comes from.

    Raises:
        ModelError: It is neither a Keras 3 nor a tf_keras model.
    """
    for cls in type(model).__mro__:
        root = cls.__module__.split(".")[0]
        if root in ("keras", "tf_keras") and cls.__name__ in ("Model", "Trainer", "Layer"):
            return KerasAPI(root)
    raise ModelError(
        f"A model must be a keras.Model or tf_keras.Model; got {type(model).__module__}.{type(model).__qualname__}."
    )


def likely_api(pickled_build: bytes) -> KerasAPI:
    """Guess the package that a pickled build function uses, without calling it."""
    legacy = b"tf_keras" in pickled_build or os.environ.get("TF_USE_LEGACY_KERAS") in ("1", "True", "true")
    return KerasAPI("tf_keras" if legacy else "keras")


def current_floatx() -> str:
    """Return `floatx` of the Keras that is loaded in this process; "float32" if none is."""
    for name in ("keras", "tf_keras"):
        if name in sys.modules and hasattr(sys.modules[name], "backend"):
            return str(sys.modules[name].backend.floatx())
    return "float32"
