"""Every exception that raykeras raises, and nothing else.

    RaykerasError
    ├── ValidationError (also ValueError)   what was asked for cannot be done
    │   ├── OptionError                     an argument of fit, Scale or Run
    │   ├── SourceError                     a path, a file, a row group
    │   ├── ColumnError                     a column, its type, its values
    │   └── ModelError                      the model does not fit its data or the run
    ├── ResourceError                       the cluster can never give what was asked
    ├── UserCodeError                       an exception in the user's own code, with its rank
    ├── WorkerLostError                     a worker or node that went away
    └── CheckpointError                     a checkpoint that cannot be written or read

A message says the rule, what was received, and what to do. All of them survive pickling,
since most are raised in another process than the one that shows them.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sysconfig
import traceback
from collections.abc import Iterator
from typing import Any

_CREDENTIALS = re.compile(r"(?<=://)(?:[^\s'\"/@]*:[^\s'\"@]*|[^\s'\"/@]+)@")
_QUERY = re.compile(r"(?<=://)([^\s'\"?]+\?)[^\s'\"]+")


def redacted(text: str) -> str:
    """Return a text with `***` in place of the user, password and query string of every URL in it."""
    return _QUERY.sub(r"\1***", _CREDENTIALS.sub("***@", text)) if "://" in text else text


class RaykerasError(Exception):
    """Root of all exceptions of raykeras; shows no credentials of URLs."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(redacted(value) if isinstance(value, str) else value for value in args))

    def __reduce__(self) -> tuple[Any, ...]:
        # Rebuilt without calling __init__, whose signature differs from class to class.
        return (_rebuild, (type(self), self.args, dict(self.__dict__)))


def _rebuild(cls: type[RaykerasError], args: tuple[Any, ...], state: dict[str, Any]) -> RaykerasError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ValidationError(RaykerasError, ValueError):
    """What was asked for cannot be done, whatever the cluster."""


class OptionError(ValidationError):
    """An argument has a value that it cannot have."""


class SourceError(ValidationError):
    """A path, file or row group cannot be read or does not belong with the others."""


class ColumnError(ValidationError):
    """A column is missing, has an unusable type, or holds values that cannot be used."""


class ModelError(ValidationError):
    """The model does not fit the data, or cannot be trained as asked."""


class ResourceError(RaykerasError):
    """The cluster can never give the workers, CPUs or GPUs that were asked for."""


class UserCodeError(RaykerasError):
    """An exception raised by the user's code (model, loss, callback, transform) on a worker.

    Attributes:
        rank: Rank of the worker, or None for a data task.
        node: Name of the node it ran on.
        cause: Qualified name of the original exception's type.
        user_traceback: The original traceback without the frames of Ray, Keras and raykeras.
    """

    def __init__(self, message: str, *, rank: int | None, node: str, cause: str, user_traceback: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.node = node
        self.cause = cause
        self.user_traceback = redacted(user_traceback)

    def __str__(self) -> str:
        where = "a data task" if self.rank is None else f"rank {self.rank}"
        return f"{self.args[0]}\n(on {where}, node {self.node})\n{self.user_traceback}".rstrip()


class WorkerLostError(RaykerasError):
    """A worker or its node went away more often than `Run.max_failures` allows.

    Attributes:
        rank: Rank of the worker; None where it is not known.
        node: Where it ran; empty where it is not known.
        reason: One line.
    """

    rank: int | None = None
    node: str = ""
    reason: str = ""


class CheckpointError(RaykerasError):
    """A checkpoint could not be written, is damaged, or belongs to another run."""


def root_cause(error: BaseException) -> BaseException:
    """The exception of ours inside what Ray and TensorFlow wrap around it; the error itself if there is none."""
    seen: list[int] = []
    current: Any = error
    while isinstance(current, BaseException) and id(current) not in seen:
        seen.append(id(current))
        inner = getattr(current, "cause", None) or getattr(current, "_base_exc", None)
        # Ray raises a type that is both its own and the original's: the original is inside
        if isinstance(current, RaykerasError) and not isinstance(inner, BaseException):
            return current
        current = inner if isinstance(inner, BaseException) else current.__cause__ or current.__context__
    return error


def user_code_error(error: BaseException, rank: int | None) -> UserCodeError:
    """An exception with the frames of the user's own code only."""
    frames = traceback.extract_tb(error.__traceback__)
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), os.path.dirname(__file__)}
    mine = [f for f in frames if not f.filename.startswith((*installed, "<frozen"))]
    text = "".join(traceback.format_list(mine or list(frames)[-3:]))
    text = f"Traceback (most recent call last):\n{text}{''.join(traceback.format_exception_only(error))}"
    summary = str(error).strip().split("\n")[0]
    return UserCodeError(
        f"{type(error).__name__}: {summary}",
        rank=rank,
        node=socket.gethostname(),
        cause=f"{type(error).__module__}.{type(error).__qualname__}",
        user_traceback=text,
    )


@contextlib.contextmanager
def loading(rank: int | None) -> Iterator[None]:
    """Where a process of Ray's unpickles what was sent to it: tells what to do where it cannot.

    Ray takes such a failure for one of its own, which would be tried again: by Ray Data without end.

    Args:
        rank: Of the worker, or None for a data task.
    """
    from ray.exceptions import RaySystemError

    try:
        yield
    except (RaySystemError, ImportError, AttributeError) as error:
        cause = error.client_exc if isinstance(error, RaySystemError) else error
        if not isinstance(cause, Exception):
            raise
        raise UserCodeError(
            "What a model, a callback or a `transform` needs must be there where Ray's processes run; "
            f"{type(cause).__name__}: {cause}. Send the module along "
            '(`ray.init(runtime_env={"py_modules": [module]})`), install it on every node, or define what is in it in '
            "the script itself.",
            rank=rank,
            node=socket.gethostname(),
            cause=f"{type(cause).__module__}.{type(cause).__qualname__}",
            user_traceback="",
        ) from None
