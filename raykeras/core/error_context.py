"""Find the cause inside wrapped exceptions, and report errors in user code with the user's frames only."""

from __future__ import annotations

import contextlib
import socket
import sysconfig
import traceback
from collections.abc import Iterator
from typing import Any

from raykeras.core.errors import RaykerasError, UserCodeError, redacted
from raykeras.core.tracebacks import PACKAGE_FOLDER

_MAX_FRAMES = 3  # of a user's traceback
_MAX_LINES, _MAX_LINE = 4, 500  # of a message; characters of a line
_ARGUMENTS = ("Call arguments received by ", "Arguments received by ")


def root_cause(error: BaseException) -> BaseException:
    """Return the `RaykerasError` that Ray or TensorFlow wrapped; the error itself if there is none."""
    seen: list[int] = []
    current: Any = error
    while isinstance(current, BaseException) and id(current) not in seen:
        seen.append(id(current))
        inner = getattr(current, "cause", None)
        # Ray raises a type that derives from both RayTaskError and the original type; the original is inside.
        if isinstance(current, RaykerasError) and not isinstance(inner, BaseException):
            return current
        current = inner if isinstance(inner, BaseException) else current.__cause__ or current.__context__
    return error


def user_code_error(error: BaseException, rank: int | None) -> UserCodeError:
    """Return an error that shows an exception with the frames of the user's code only.

    Args:
        error: The exception that the user's code raised.
        rank: Rank of the worker, or None for a data task.

    Returns:
        A `UserCodeError` that is also an instance of the exception's class, where that is possible.
    """
    frames = traceback.extract_tb(error.__traceback__)
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), PACKAGE_FOLDER}
    library_paths = (*installed, sysconfig.get_path("stdlib"), "<frozen")
    user_frames = [
        frame
        for frame in frames
        if not frame.filename.startswith(library_paths) and "/__autograph_generated" not in frame.filename
    ]
    stack = "".join(traceback.format_list(user_frames[-_MAX_FRAMES:]))
    lines = message_lines(error)
    name = type(error).__name__.removeprefix("MultilineMessage")  # AutoGraph's subclass of KeyError
    lines[0] = lines[0].removeprefix(f"{name}: ")
    message = f"{name}: " + "\n".join(lines)
    user_error = UserCodeError(
        f"{name}: {lines[0]}",
        rank=rank,
        node=socket.gethostname(),
        cause=f"{type(error).__module__}.{type(error).__qualname__}",
        user_traceback=(
            f"Traceback (most recent call last):\n{stack}{message}" if user_frames else "\n".join(lines[1:])
        ),
    )
    user_error.full_traceback = redacted("".join(traceback.format_exception(error)))
    return user_error.as_instance_of(error)


def message_lines(error: BaseException) -> list[str]:
    """Return the lines of an exception's message that say what is wrong.

    TensorFlow surrounds them with the stack of the graph or the frames of a traced function.
    """
    lines = [line.rstrip()[:_MAX_LINE] for line in str(error).strip().splitlines() if line.strip()] or [""]
    is_traced, is_raised_by_tensorflow = lines[0] == "in user code:", type(error).__module__.startswith("tensorflow.")
    if is_traced or is_raised_by_tensorflow:  # Keras adds the arguments of a layer
        end = next((i for i, line in enumerate(lines) if line.strip().startswith(_ARGUMENTS)), 0)
        lines = lines[:end] or lines
    if is_traced:  # AutoGraph: frames, each with a line of code, then the message
        start = max((i for i, line in enumerate(lines) if line.strip().startswith("File ")), default=-1) + 2
        lines = [line.strip() for line in lines[start:]] or lines
    if is_raised_by_tensorflow:
        stack = ("File ", "Graph execution error", "Detected at", "Node:", "Stack trace for op", "[[", "Original stack")
        message = [line for line in lines if not line.strip().startswith(stack) and not line.startswith("  ")]
        lines = message[-1:] or lines
    return lines[:_MAX_LINES]


@contextlib.contextmanager
def loading(rank: int | None) -> Iterator[None]:
    """Raise failures to unpickle objects as `UserCodeError` while the block runs.

    Ray would treat such a failure as a system error and retry the task; Ray Data retries without limit.

    Args:
        rank: Rank of the worker, or None for a data task.

    Raises:
        UserCodeError: A module or name that the objects need cannot be imported in this process.
    """
    from ray.exceptions import RaySystemError

    try:
        yield
    except (RaySystemError, ImportError, AttributeError) as error:
        cause = error.client_exc if isinstance(error, RaySystemError) else error
        if not isinstance(cause, Exception):
            raise
        raise UserCodeError(
            "The modules that a model, a callback or a `transform` uses must be importable in Ray's processes; got "
            f"{type(cause).__name__}: {cause}. Ship the module "
            '(`ray.init(runtime_env={"py_modules": [module]})`), install it on every node, or move its code into the '
            "script.",
            rank=rank,
            node=socket.gethostname(),
            cause=f"{type(cause).__module__}.{type(cause).__qualname__}",
            user_traceback="",
        ) from None
