"""What a job may leave behind in its process, removed before the next job."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import sysconfig
import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from raykeras.compat.keras_api import KerasAPI
from raykeras.core.tracebacks import PACKAGE_FOLDER


class ProcessState:
    """Remembers the state of this process, and restores it after each job.

    Restored are settings of TensorFlow and Keras, environment variables, the working folder, the search path of
    modules, warning filters, and modules of the user, which the next job imports again. What user code changed in
    other packages stays.
    """

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._folder = os.getcwd()
        self._path = list(sys.path)
        self._arguments = list(sys.argv)
        self._filters = list(warnings.filters)
        self._modules = set(sys.modules)
        self._settings = _tensorflow_settings()
        self._packages: dict[str, tuple[KerasAPI, dict[str, Any]]] = {}
        gc.freeze()  # what was imported stays: without this, each collection takes 0.2 s

    def add(self, api: KerasAPI) -> None:
        """Restore the settings of a Keras package, too, as they are now."""
        if api.name not in self._packages:
            self._packages[api.name] = (api, api.settings())
            gc.freeze()

    def restore(self) -> None:
        """Restore the state."""
        for api, settings in self._packages.values():
            api.restore(settings)
        for name, value in self._settings.items():
            _SETTERS[name](value)
        if dict(os.environ) != self._environment:
            os.environ.clear()
            os.environ.update(self._environment)
        os.chdir(self._folder)
        sys.path[:], sys.argv[:] = self._path, self._arguments
        warnings.filters[:] = self._filters  # type: ignore[index]
        for name in [name for name, module in sys.modules.items() if name not in self._modules and _is_users(module)]:
            del sys.modules[name]
        importlib.invalidate_caches()
        gc.collect()


_INSTALLED = tuple(
    {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")} | {PACKAGE_FOLDER}
)

_SETTERS: dict[str, Callable[[Any], None]] = {
    "eager": tf.config.run_functions_eagerly,
    "jit": lambda value: tf.config.optimizer.set_jit(value or False),
    "tf32": tf.config.experimental.enable_tensor_float_32_execution,
    "placement": tf.config.set_soft_device_placement,
}


def _tensorflow_settings() -> dict[str, Any]:
    return {
        "eager": tf.config.functions_run_eagerly(),
        "jit": tf.config.optimizer.get_jit(),
        "tf32": tf.config.experimental.tensor_float_32_execution_enabled(),
        "placement": tf.config.get_soft_device_placement(),
    }


def _is_users(module: Any) -> bool:
    """Return whether a module is neither installed, nor built in, nor of raykeras."""
    file = getattr(module, "__file__", None)
    if file is None:
        folders = getattr(module, "__path__", None)  # of a namespace package
        file = next(iter(folders), None) if folders is not None else None
    return file is not None and not str(file).startswith(_INSTALLED)
