"""What a user sees of an exception: their own frames and the message.

Enters: a public function. Leaves: the same function, whose exceptions carry no frames of what it called; the printing
of tracebacks leaves out its own frame as well. `keras.config.disable_traceback_filtering()` shows all frames.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from raykeras.errors import RaykerasError

P = ParamSpec("P")
R = TypeVar("R")
_HERE = os.path.dirname(__file__) + os.sep


def without_frames(function: Callable[P, R]) -> Callable[P, R]:
    """Let exceptions of raykeras, and Ctrl-C, leave a function without the frames inside of it."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (RaykerasError, KeyboardInterrupt) as error:
            if not _filters():
                raise
            raised = error.with_traceback(None)
        _show_without_frames()
        raise raised from None

    return call


def _filters() -> bool:
    """Return whether Keras filters tracebacks, as it does unless it was told not to."""
    keras = sys.modules.get("keras")
    return keras is None or not hasattr(keras, "config") or bool(keras.config.is_traceback_filtering_enabled())


def outside(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """Return a traceback without the frames of this package."""
    if traceback is None:
        return None
    inner = outside(traceback.tb_next)
    if traceback.tb_frame.f_code.co_filename.startswith(_HERE):
        return inner
    return types.TracebackType(inner, traceback.tb_frame, traceback.tb_lasti, traceback.tb_lineno)


def _show_without_frames() -> None:
    """Have Python and IPython print exceptions of raykeras without its frames."""
    shown = sys.excepthook
    if getattr(shown, "__module__", None) != __name__:

        def hook(kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None) -> Any:
            if isinstance(error, RaykerasError) and _filters():
                traceback = outside(traceback)
                error.__traceback__ = traceback  # which is what Python's own hook prints
            return shown(kind, error, traceback)

        sys.excepthook = hook
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None and RaykerasError not in shell.custom_exceptions:
        shell.set_custom_exc((*shell.custom_exceptions, RaykerasError), _show_in_ipython)


def _show_in_ipython(shell: Any, kind: Any, error: Any, traceback: Any, tb_offset: Any = None) -> None:
    lines = shell.InteractiveTB.structured_traceback(kind, error, outside(traceback), tb_offset=tb_offset)
    shell._showtraceback(kind, error, lines)
