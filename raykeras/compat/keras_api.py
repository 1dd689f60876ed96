"""One interface to Keras 3 and tf_keras (Keras 2), which hides their differences."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from raykeras.compat import keras3, tf_keras
from raykeras.compat.keras_callbacks import accepts_tensors
from raykeras.compat.patch import patched
from raykeras.compat.versions import PrivateName, refuse_older
from raykeras.core.errors import ModelError
from raykeras.core.logs import plain_number
from raykeras.core.plain_values import plain_value
from raykeras.core.structures import is_deep

GLOBAL_GENERATOR = PrivateName(
    "tensorflow.python.ops.stateful_random_ops:global_generator",
    "save the state of `tf.random.get_global_generator()`",
    "its random numbers differ after a resume",
)


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
            RaykerasError: It is older than the tested range, or tf_keras is not installed.
        """
        refuse_older(self.name)
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
    def names(self) -> ModuleType:
        """The module of `raykeras.compat` with the private names of the package."""
        return tf_keras if self.is_legacy else keras3

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def allows_unsafe_deserialization(self) -> bool:
        """Whether `enable_unsafe_deserialization` of the package was called in this process."""
        if self.name not in sys.modules:
            return False
        saving = self.module.saving
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of lambdas.
            config = saving.serialize_keras_object(lambda: None)
        try:
            saving.deserialize_keras_object(config)
        except ValueError:
            return False
        return True

    @property
    def ends_epochs_with_data(self) -> bool:
        """Whether `fit(steps_per_epoch=…)` ends an epoch where the data ends; tf_keras stops training there."""
        return not self.is_legacy

    @property
    def compiles_executions(self) -> bool:
        """Whether a model's functions are compiled for `steps_per_execution`, and may run beyond an epoch's end.

        In tf_keras, it is a variable that may change while the model is trained.
        """
        return not self.is_legacy

    @property
    def requires_listed_weights(self) -> bool:
        """Whether sample weights must be a list if the outputs are a list."""
        return not self.is_legacy

    @property
    def can_leave_strategy(self) -> bool:
        """Whether a model that was built under a strategy can be used outside of it."""
        return not self.is_legacy

    def describe(self, model: Any) -> dict[str, Any]:
        """Return the class of a model and, as JSON values, what is known of it before training.

        Returns:
            "class"; of a built model "summary", "parameters" and "trainable_parameters"; and "optimizer".
        """
        described: dict[str, Any] = {"class": type(model).__name__}
        with contextlib.suppress(Exception):  # a user's layer may lack what a summary needs
            if model.built:
                lines: list[str] = []
                model.summary(print_fn=lambda line, **_: lines.append(str(line)))
                described["parameters"] = sum(int(np.prod(weight.shape)) for weight in model.weights)
                described["trainable_parameters"] = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
                described["summary"] = "\n".join(lines)
        optimizer = getattr(model, "optimizer", None)
        with contextlib.suppress(Exception):  # a user's optimizer may lack `get_config`
            if optimizer is not None:
                described["optimizer"] = plain_value({"class": type(optimizer).__name__, **optimizer.get_config()})
        return described

    def learning_rate(self, model: Any) -> float | None:
        """Return the learning rate of the next step; None if the model has no optimizer with one."""
        optimizer = getattr(model, "optimizer", None)
        rate: Any = None
        with contextlib.suppress(Exception):  # a user's schedule may only work inside of a step
            rate = optimizer.learning_rate  # type: ignore[union-attr]
            if callable(rate) and not hasattr(rate, "numpy"):
                rate = rate(optimizer.iterations)  # type: ignore[union-attr]
            rate = plain_number(rate)
        return rate if isinstance(rate, float) and math.isfinite(rate) else None

    def settings(self) -> dict[str, Any]:
        """Return the settings of the package that apply to this process, for `restore`."""
        backend, policies = self.module.backend, self.module.mixed_precision
        return {
            "floatx": backend.floatx(),
            "epsilon": backend.epsilon(),
            "image_data_format": backend.image_data_format(),
            "policy": policies.global_policy() if self.is_legacy else policies.dtype_policy(),
            "custom_objects": dict(self.module.saving.get_custom_objects()),
        }

    def restore(self, settings: dict[str, Any]) -> None:
        """Clear the package's global state, and restore its settings.

        Args:
            settings: As `settings` returned them.
        """
        backend, policies, saving = self.module.backend, self.module.mixed_precision, self.module.saving
        backend.clear_session()
        backend.set_floatx(settings["floatx"])
        backend.set_epsilon(settings["epsilon"])
        backend.set_image_data_format(settings["image_data_format"])
        set_policy = policies.set_global_policy if self.is_legacy else policies.set_dtype_policy
        set_policy(settings["policy"])
        saving.get_custom_objects().clear()
        saving.get_custom_objects().update(settings["custom_objects"])

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
        inputs = (layer for layer in _functional(model).layers if isinstance(layer, self.module.layers.InputLayer))
        return any(getattr(layer, "optional", False) and layer.output is tensor for layer in inputs)

    def _inputs(self, model: Any) -> dict[str, Any] | None:
        inner = _functional(model)
        if not getattr(inner, "inputs", None):
            return None
        struct = getattr(inner, "input", None)
        if is_deep(struct):
            return None
        if isinstance(struct, dict):
            return {str(name): tensor for name, tensor in struct.items()}
        names = inner.input_names if self.is_legacy else [tensor.name for tensor in inner.inputs]
        return {str(name): tensor for name, tensor in zip(names, inner.inputs, strict=True)}

    def output_names(self, model: Any) -> list[str] | None:
        """Return the names under which `y` is fed, in the order of the outputs; None if there are none."""
        struct = self.output_structure(model)
        if isinstance(struct, dict):
            names = {id(tensor): str(name) for name, tensor in struct.items()}
            is_unambiguous = not is_deep(struct) and len(names) == len(struct)  # no tensor occurs twice
            return [names[id(tensor)] for tensor in _functional(model).outputs] if is_unambiguous else None
        if not getattr(model, "outputs", None) or getattr(model, "output_names", None) is None:
            return None
        return [str(name) for name in model.output_names]

    def output_structure(self, model: Any) -> Any:
        """Return the outputs of a functional model, nested as the model returns them; None for other models."""
        inner = _functional(model)
        return getattr(inner, "output", None) if getattr(inner, "outputs", None) else None

    def ordered_values(self, model: Any, logs: dict[str, Any]) -> list[Any]:
        """Return the values of `evaluate(return_dict=True)` in the order of `return_dict=False`."""
        if self.is_legacy:
            names = model.metrics_names
        else:
            names = [inner.name for metric in model.metrics for inner in self._inner_metrics(metric)]
        listed = [name for name in names if name in logs]
        return [plain_number(logs[name]) for name in (*listed, *sorted(set(logs) - set(names)))]

    def _inner_metrics(self, metric: Any) -> list[Any]:
        """Return the metrics of `compile`, which Keras 3 holds in one metric; for other metrics the metric itself."""
        is_of_keras = type(metric).__module__.split(".")[0] == self.name
        return list(metric.metrics) if is_of_keras and hasattr(metric, "metrics") else [metric]

    def steps_per_execution(self, model: Any) -> int:
        """Return the number of steps that the model runs per call of its compiled function."""
        steps = getattr(model, "steps_per_execution", None)
        return 1 if steps is None else int(steps if isinstance(steps, int) else steps.numpy())

    def direct_hooks(self, callbacks: Sequence[Any], hook: str) -> list[Callable[..., None]] | None:
        """Return the overridden hooks of this name, if all of these callbacks accept tensors in `logs`; else None.

        Keras 3 converts the logs to numbers for every callback, which waits for the step to finish; tf_keras only for
        callbacks that need numbers.
        """
        if self.is_legacy:
            return None
        names = {hook, hook.replace("train_", "")}  # The default train hooks call the shorter one.
        base = self.module.callbacks.Callback
        defaults = {name: getattr(base, name) for name in names}
        overriding = [
            callback
            for callback in callbacks
            if any(getattr(getattr(callback, name), "__func__", None) is not defaults[name] for name in names)
        ]
        if not all(map(accepts_tensors, overriding)):
            return None
        return [getattr(callback, hook) for callback in overriding]

    def variables(self, model: Any) -> list[Any]:
        """Return the variables of a model and its optimizer, in a fixed order."""
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None:
            return list(model.variables)
        optimizer_variables = optimizer.variables() if callable(optimizer.variables) else optimizer.variables
        return [*model.variables, *optimizer_variables, *self.separate_learning_rate(model)]

    def separate_learning_rate(self, model: Any) -> list[Any]:
        """Return the variable of the learning rate if the optimizer's variables, and so its file, lack it.

        This is so in tf_keras, unless the learning rate is a schedule.
        """
        rate = getattr(getattr(model, "optimizer", None), "learning_rate", None) if self.is_legacy else None
        return [rate] if hasattr(rate, "assign") else []

    def path_of(self, variable: Any) -> str:
        """Return the path of a variable; in tf_keras, its name."""
        return variable.name if self.is_legacy else variable.path

    def metric_variables(self, model: Any) -> list[Any]:
        """Return the variables of all metrics, in a fixed order and without duplicates."""
        variables = [variable for metric in model.metrics for variable in metric.variables]
        return list({id(variable): variable for variable in variables}.values())

    def seed_states(self, model: Any) -> list[Any]:
        """Return the variables with the state of the random number generators, in a fixed order."""
        if self.is_legacy:
            states = tf_keras.random_states(model)
        else:
            states = [v for v in model.variables if v.path.endswith("seed_generator_state")]
            states.append(keras3.shared_seed_state())
        generator = GLOBAL_GENERATOR.find()  # `tf.random.get_global_generator` would create one.
        states.append(None if generator is None else generator.state)
        return [state for state in states if state is not None]

    def synchronizes(self, model: Any) -> bool:
        """Return whether a layer computes statistics over the rows of all replicas."""
        return any(getattr(layer, "synchronized", False) for layer in self.layers(model))

    def layers(self, model: Any) -> list[Any]:
        """Return a model and all layers in it, each before those in it."""
        return list((tf_keras if self.is_legacy else keras3).FLATTEN_LAYERS.of(model)())

    def inherits(self, model: Any, method: str) -> bool:
        """Return whether a model inherits a method from Keras rather than overriding it."""
        owner = next((cls for cls in type(model).__mro__ if method in vars(cls)), None)
        return owner is not None and self._defines(owner)

    def defining_class(self, model: Any, method: str) -> type:
        """Return the class of Keras that defines a method of a model, which the model may override."""
        return next(cls for cls in type(model).__mro__ if method in vars(cls) and self._defines(cls))

    def _defines(self, cls: type) -> bool:
        return cls in self.module.Model.__mro__

    @contextlib.contextmanager
    def logs_reduced_by(self, reduce: Callable[[Any, Any], Any]) -> Iterator[None]:
        """Have Keras reduce the logs of a step on several replicas with a function while the block runs.

        Args:
            reduce: Maps the logs, whose values hold those of all replicas, and the strategy to the reduced logs.
        """
        original = self.names.REDUCE_PER_REPLICA.get()

        def reduce_per_replica(values: Any, strategy: Any, reduction: str) -> Any:
            is_logs = reduction == "auto" and isinstance(values, dict)
            return reduce(values, strategy) if is_logs else original(values, strategy, reduction)

        with self.names.REDUCE_PER_REPLICA.replaced(reduce_per_replica):
            yield

    def has_own_steps(self, model: Any) -> bool:
        """Return whether a model overrides `train_step`, `test_step` or `compute_loss`."""
        return not all(self.inherits(model, method) for method in ("train_step", "test_step", "compute_loss"))

    def has_call(self, model: Any) -> bool:
        """Return whether a model defines `call`; a model with a custom `train_step` need not."""
        return type(model).call is not self.module.Model.call

    @contextlib.contextmanager
    def marked_as_built(self, model: Any) -> Iterator[None]:
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

    def check_weighted_metrics(self, model: Any) -> None:
        """Warn, if this package does, that no metric uses the sample weights of a dataset."""
        if self.is_legacy:
            tf_keras.check_weighted_metrics(model)

    def losses_in_layers(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which layers may call losses under a strategy."""
        return tf_keras.losses_in_layers() if self.is_legacy else contextlib.nullcontext()

    def build(self, model: Any, batch: tuple[Any, ...]) -> None:
        """Create the variables of a model, its metrics and its optimizer, as `fit` does in the first step.

        Args:
            model: A compiled model.
            batch: A batch with the shapes of the data.
        """
        if self.has_call(model) and not self.is_legacy:
            keras3.build_symbolically(model, batch)
            return
        if self.has_call(model):
            x, y = (*batch, None)[:2]
            with tf_keras.losses_in_layers():
                predicted = model(x, training=False)
            tf_keras.build_losses_and_metrics(model, y, predicted)
        self.build_optimizer(model)

    def build_optimizer(self, model: Any) -> None:
        """Create the optimizer's variables, which Keras otherwise creates in the first step."""
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None or not (model.built or not self.has_call(model)):
            return
        if self.is_legacy and hasattr(optimizer, tf_keras.CREATE_ALL_WEIGHTS.attribute):
            with contextlib.suppress(NotImplementedError):  # TensorFlow's own optimizers
                tf_keras.CREATE_ALL_WEIGHTS.of(optimizer)(model.trainable_variables)
        elif not getattr(optimizer, "built", getattr(optimizer, "_built", False)):
            optimizer.build(model.trainable_variables)


def loss_arguments(loss: Any) -> dict[str, Any]:
    """Return the arguments that a loss object of Keras passes to the function that it wraps."""
    arguments = getattr(loss, "_fn_kwargs", None)
    return loss.get_config() if arguments is None and hasattr(loss, "get_config") else dict(arguments or {})


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


def guess_api(pickled_build: bytes) -> KerasAPI:
    """Guess the package that a pickled build function uses, without calling it."""
    legacy = b"tf_keras" in pickled_build or os.environ.get("TF_USE_LEGACY_KERAS") in ("1", "True", "true")
    return KerasAPI("tf_keras" if legacy else "keras")


def current_floatx() -> str:
    """Return `floatx` of the Keras that is loaded in this process; "float32" if none is."""
    for name in ("keras", "tf_keras"):
        if name in sys.modules and hasattr(sys.modules[name], "backend"):
            return str(sys.modules[name].backend.floatx())
    return "float32"
