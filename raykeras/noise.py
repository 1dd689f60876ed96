"""Keeps from the user what starting Ray and TensorFlow would say, and some of what importing TensorFlow would take.

Errors, and exceptions, still show.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

from raykeras.errors import RaykerasError, root_cause


def quiet() -> None:
    """Sets log levels, in the environment that workers inherit too. Imports nothing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name in ("ray.data", "ray.train", "ray._private", "ray._common", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("ray.data._internal.execution.streaming_executor_state", "ray.data.exceptions"):
        logging.getLogger(name).addFilter(_is_not_ours)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\..*")
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors", UserWarning, r"ray\.data\..*")


def _is_not_ours(record: logging.LogRecord) -> bool:
    """Leave out what Ray Data says of exceptions of raykeras, which are raised as well."""
    error = sys.exc_info()[1]
    is_of_task = "ReadPlanned" in record.getMessage()
    return not is_of_task and (error is None or not isinstance(root_cause(error), RaykerasError))


def import_tensorflow() -> None:
    """Imports TensorFlow without the lines that it writes before its log level is read, in four fifths of the time."""
    if "tensorflow" in sys.modules:
        return
    with _stderr_kept_back(), _garbage_kept():
        importlib.import_module("tensorflow")


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    """Collects no garbage: among 350,000 objects that stay, 900 collections look for it."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # or what the user froze would be unfrozen
            gc.freeze()
            gc.unfreeze()  # into the oldest generation, so that the next collection does not go through them either
        gc.enable()


@contextlib.contextmanager
def _stderr_kept_back() -> Iterator[None]:
    """Holds back what C++ writes to stderr, and shows it if there is an exception."""
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)
            if failed:
                kept.seek(0)
                os.write(2, kept.read())
