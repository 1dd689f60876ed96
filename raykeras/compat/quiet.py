"""Silence the start-up output of Ray and TensorFlow, and speed up the import of TensorFlow.

Exceptions are never hidden. Ray's loggers still show errors; TensorFlow's C++ log shows fatal errors only.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from raykeras.core.error_context import root_cause
from raykeras.core.errors import RaykerasError


def quiet() -> None:
    """Set log levels and warning filters. Workers inherit the environment variables; nothing is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name in ("ray.data", "ray.train", "ray._private", "ray._common", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("ray.data._internal.execution.streaming_executor_state", "ray.data.exceptions"):
        logging.getLogger(name).addFilter(_is_unreported)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors", UserWarning, r"ray\.data\..*")


def _is_unreported(record: logging.LogRecord) -> bool:
    """Return whether a log record is not about an exception that raykeras raises anyway."""
    error = sys.exc_info()[1]
    is_about_read_task = "ReadPlanned" in record.getMessage()
    return not is_about_read_task and (error is None or not isinstance(root_cause(error), RaykerasError))


@contextlib.contextmanager
def without_eager_strategy_warning() -> Iterator[None]:
    """Drop TensorFlow's warning about strategies in eager execution while the block runs."""

    def is_other(record: logging.LogRecord) -> bool:
        return "eagerly has significant overhead" not in str(record.msg)

    logger = logging.getLogger("tensorflow")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def import_tensorflow() -> None:
    """Import TensorFlow without the lines that it writes to stderr before it reads its log level."""
    if "tensorflow" in sys.modules:
        return
    with _stderr_captured(), _gc_paused():
        importlib.import_module("tensorflow")


def quiet_user_import() -> None:
    """Let code of the user that imports TensorFlow, as Keras does, import it like `import_tensorflow`."""
    if "tensorflow" not in sys.modules and not any(isinstance(finder, _TensorFlowFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TensorFlowFinder())


class _TensorFlowFinder(MetaPathFinder):
    """Finds TensorFlow once, as the other finders do."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "tensorflow":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_quietly(module: ModuleType) -> None:
                with _stderr_captured(), _gc_paused():
                    execute(module)

            spec.loader.exec_module = execute_quietly  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def _gc_paused() -> Iterator[None]:
    """Pause garbage collection while the block runs: most objects that an import creates stay alive."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # unfreeze() would also unfreeze the user's objects.
            gc.freeze()
            gc.unfreeze()  # Moves all objects to the oldest generation, which the next collections skip.
        gc.enable()


@contextlib.contextmanager
def _stderr_captured() -> Iterator[None]:
    """Capture what C++ writes to stderr while the block runs; write it out only if the block raises."""
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)
            if failed:
                captured.seek(0)
                os.write(2, captured.read())
