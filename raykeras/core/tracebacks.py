"""Hide raykeras' frames in the tracebacks that users see.

`keras.config.disable_traceback_filtering()` shows all frames.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from raykeras.core.errors import RaykerasError

P = ParamSpec("P")

R = TypeVar("R")

PACKAGE_FOLDER = os.path.dirname(os.path.dirname(__file__)) + os.sep


def without_frames(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function so that errors of raykeras and Ctrl-C carry no frames from inside it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (RaykerasError, KeyboardInterrupt) as error:
            if not _is_filtering():
                raise
            filtered = error.with_traceback(None)
        _install_hooks()
        raise filtered from None

    return call


def _is_filtering() -> bool:
    """Return whether Keras filters tracebacks, which is its default."""
    keras = sys.modules.get("keras")
    return keras is None or not hasattr(keras, "config") or bool(keras.config.is_traceback_filtering_enabled())


def without_package_frames(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """Return a traceback without the frames of this package and of Python's import system."""
    if traceback is None:
        return None
    inner = without_package_frames(traceback.tb_next)
    if traceback.tb_frame.f_code.co_filename.startswith((PACKAGE_FOLDER, "<frozen importlib")):
        return inner
    return types.TracebackType(inner, traceback.tb_frame, traceback.tb_lasti, traceback.tb_lineno)


def _install_hooks() -> None:
    """Have Python and IPython print errors of raykeras without its frames."""
    original_hook = sys.excepthook
    if getattr(original_hook, "__module__", None) != __name__:

        def hook(kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None) -> Any:
            if isinstance(error, RaykerasError) and _is_filtering():
                traceback = without_package_frames(traceback)
                error.__traceback__ = traceback  # Python's default hook prints this one.
            return original_hook(kind, error, traceback)

        sys.excepthook = hook
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and RaykerasError not in shell.custom_exceptions:
        shell.set_custom_exc((*shell.custom_exceptions, RaykerasError), _show_in_ipython)


def _show_in_ipython(shell: Any, kind: Any, error: Any, traceback: Any, tb_offset: Any = None) -> None:
    shell.showtraceback((kind, error, without_package_frames(traceback)), tb_offset=tb_offset)
