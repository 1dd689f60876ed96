"""The exception hierarchy of raykeras:

    RaykerasError
    ├── ValidationError (also ValueError)   a request that cannot be fulfilled on any cluster
    │   ├── OptionError                     an argument of `fit`, `Scale` or `Run`
    │   ├── SourceError                     a path, a file or a row group
    │   ├── ColumnError                     a column, its type or its values
    │   └── ModelError                      a model that does not fit its data or the run
    ├── ResourceError                       the cluster can never provide the requested resources
    ├── UserCodeError                       an exception in the user's code, with the worker's rank
    ├── WorkerLostError                     a worker or node was lost
    └── CheckpointError                     a checkpoint cannot be written or read

All exceptions survive pickling, since most are raised in one process and shown in another. Their messages never show
credentials of URLs.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import sys
from typing import Any

_CREDENTIALS = re.compile(r"(?<=://)(?:[^\s'\"/@]*:[^\s'\"@]*|[^\s'\"/@]+)@")

_QUERY = re.compile(r"(?<=://)([^\s'\"?]+\?)[^\s'\"]+")


def redacted(text: str) -> str:
    """Return text with `***` in place of the user, password and query string of every URL."""
    return _QUERY.sub(r"\1***", _CREDENTIALS.sub("***@", text)) if "://" in text else text


def printable(text: str) -> str:
    """Return text that is safe to show: `redacted`, and without characters that control a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in redacted(text))


def printable_line(text: str) -> str:
    """Return `printable` text of one line."""
    return printable(text).replace("\n", "\ufffd")


class RaykerasError(Exception):
    """Base class of all exceptions of raykeras."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(redacted(value) if isinstance(value, str) else value for value in args))

    def __reduce__(self) -> tuple[Any, ...]:
        # Rebuilt without calling __init__, whose signature differs between classes.
        return (_rebuild, (type(self), self.args, dict(self.__dict__)))


def _rebuild(cls: type[RaykerasError], args: tuple[Any, ...], state: dict[str, Any]) -> RaykerasError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ValidationError(RaykerasError, ValueError):
    """The request cannot be fulfilled on any cluster."""


class OptionError(ValidationError):
    """An argument has an invalid value."""


class SourceError(ValidationError):
    """A path, file or row group cannot be read, or does not match the others."""


class ColumnError(ValidationError):
    """A column is missing, has an unsupported type, or holds invalid values."""


class ModelError(ValidationError):
    """The model does not fit the data, or cannot be trained as requested."""


class ResourceError(RaykerasError):
    """The cluster can never provide the requested workers, CPUs or GPUs."""


class UserCodeError(RaykerasError):
    """An exception raised by the user's code (model, loss, callback, transform) on a worker.

    Where possible, it is also an instance of the original exception's class, so that `except FileNotFoundError`
    catches it.

    Attributes:
        summary: Class and message of the original exception, in one line.
        rank: Rank of the worker, or None for a data task.
        node: Name of the node it ran on.
        cause: Qualified name of the original exception's type.
        user_traceback: The original traceback without the frames of Ray, Keras and raykeras.
        full_traceback: The original traceback with all frames.
        traceback_file: Path of the full traceback in the run's folder; empty if it was not saved.
    """

    full_traceback: str = ""
    traceback_file: str = ""

    def __init__(self, message: str, *, rank: int | None, node: str, cause: str, user_traceback: str) -> None:
        super().__init__(message)
        self.summary = self.args[0]
        self.rank = rank
        self.node = node
        self.cause = cause
        self.user_traceback = redacted(user_traceback)

    def __str__(self) -> str:
        where = "a data task" if self.rank is None else f"rank {self.rank}"
        all_frames = f"; all frames in {redacted(self.traceback_file)}" if self.traceback_file else ""
        return f"{self.summary}\n(on {where}, node {self.node}{all_frames})\n{self.user_traceback}".rstrip()

    def as_instance_of(self, original: BaseException) -> UserCodeError:
        """Return this error as an instance of the original's class as well; `self` if that is not possible.

        Args:
            original: The exception of the user's code.
        """
        state = {**_picklable_attributes(original), **vars(self)}
        return _dual_error(type(original), _arguments(original), original.args, state) or self


class _DualError(UserCodeError):
    """A `UserCodeError` that is also an instance of the original exception's class."""

    original: type[BaseException]

    def __reduce__(self) -> tuple[Any, ...]:
        pickler: Any = sys.modules.get("ray.cloudpickle", pickle)  # can pickle classes defined in scripts
        try:
            original = pickler.dumps(self.original)
        except Exception:
            original = b""
        return (_rebuild_dual, (original, _arguments(self), self.args, dict(vars(self))))


def _dual_class(original: type[BaseException]) -> type[_DualError] | None:
    """Return a class that derives from `UserCodeError` and `original`; None if that is not possible."""
    if not issubclass(original, Exception) or issubclass(original, StopIteration | StopAsyncIteration | RaykerasError):
        return None  # Python would take a StopIteration for the end of an iteration.
    names = {"original": original, "__module__": __name__, "__qualname__": "UserCodeError"}
    try:
        return type("UserCodeError", (_DualError, original), names)
    except TypeError:
        return None


def _arguments(error: BaseException) -> tuple[Any, ...]:
    """Return the arguments of an exception's constructor; an `OSError` leaves the file name out of its `args`."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror, error.filename
    return error.args


def _dual_error(
    original: type[BaseException], arguments: tuple[Any, ...], args: tuple[Any, ...], state: dict[str, Any]
) -> UserCodeError | None:
    cls = _dual_class(original)
    if cls is None:
        return None
    try:
        error = cls.__new__(cls, *arguments)
        if isinstance(error, OSError):  # sets errno and filename in __init__
            OSError.__init__(error, *arguments)
    except Exception:  # The constructor takes other arguments.
        return None
    error.args = args
    error.__dict__.update(state)
    return error


def _rebuild_dual(
    original: bytes, arguments: tuple[Any, ...], args: tuple[Any, ...], state: dict[str, Any]
) -> RaykerasError:
    try:
        error = _dual_error(pickle.loads(original), arguments, args, state)
    except Exception:  # The original's module is not installed here.
        error = None
    return error or _rebuild(UserCodeError, (state["summary"],), state)


def _picklable_attributes(error: BaseException) -> dict[str, Any]:
    attributes = {}
    for name, value in vars(error).items():
        with contextlib.suppress(Exception):
            pickle.dumps(value)
            attributes[name] = value
    return attributes


class WorkerLostError(RaykerasError):
    """Workers or their nodes were lost more often than `Run.max_failures` allows.

    Attributes:
        rank: Rank of the worker; None if unknown.
        node: Name of the node it ran on; empty if unknown.
        reason: What happened, in one line.
    """

    rank: int | None = None
    node: str = ""
    reason: str = ""


class CheckpointError(RaykerasError):
    """A checkpoint could not be written, is damaged, or belongs to another run."""
