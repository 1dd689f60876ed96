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
import pickle
import re
import socket
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from typing import Any

_MAX_FRAMES, _MAX_LINES, _MAX_LINE = 3, 4, 500  # of the user's own traceback, and of a message
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

    It is also of the class of that exception, wherever there can be a class of both, so that
    `except FileNotFoundError` catches it.

    Attributes:
        summary: The original exception's class and message, in one line.
        rank: Rank of the worker, or None for a data task.
        node: Name of the node it ran on.
        cause: Qualified name of the original exception's type.
        user_traceback: The original traceback without the frames of Ray, Keras and raykeras.
        full_traceback: With all frames.
        traceback_file: Where the run's folder holds it; empty where it does not.
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

    def also_as(self, original: BaseException) -> UserCodeError:
        """Return the same error as one of the original's class, too; itself, if there can be no such class."""
        state = {**_plain_attributes(original), **vars(self)}
        return _also_as(type(original), _arguments(original), original.args, state) or self


class _Both(UserCodeError):
    """A `UserCodeError` that is of another class, too."""

    original: type[BaseException]

    def __reduce__(self) -> tuple[Any, ...]:
        pickler: Any = sys.modules.get("ray.cloudpickle", pickle)  # pickles classes of scripts, too
        try:
            original = pickler.dumps(self.original)
        except Exception:
            original = b""
        return (_rebuild_both, (original, _arguments(self), self.args, dict(vars(self))))


def _class_of_both(original: type[BaseException]) -> type[_Both] | None:
    """Return a class of both; None if there can be none."""
    if not issubclass(original, Exception) or issubclass(original, StopIteration | StopAsyncIteration | RaykerasError):
        return None  # Python itself takes some of them for the end of an iteration
    names = {"original": original, "__module__": __name__, "__qualname__": "UserCodeError"}
    try:
        return type("UserCodeError", (_Both, original), names)
    except TypeError:
        return None


def _arguments(error: BaseException) -> tuple[Any, ...]:
    """Return what an exception's constructor takes; `OSError` leaves the file's name out of its `args`."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.strerror, error.filename
    return error.args


def _also_as(
    original: type[BaseException], arguments: tuple[Any, ...], args: tuple[Any, ...], state: dict[str, Any]
) -> UserCodeError | None:
    cls = _class_of_both(original)
    if cls is None:
        return None
    try:
        error = cls.__new__(cls, *arguments)
        if isinstance(error, OSError):  # which sets its attributes there
            OSError.__init__(error, *arguments)
    except Exception:  # its constructor wants something else
        return None
    error.args = args
    error.__dict__.update(state)
    return error


def _rebuild_both(
    original: bytes, arguments: tuple[Any, ...], args: tuple[Any, ...], state: dict[str, Any]
) -> RaykerasError:
    try:
        error = _also_as(pickle.loads(original), arguments, args, state)
    except Exception:  # its module is not installed here
        error = None
    return error or _rebuild(UserCodeError, (state["summary"],), state)


def _plain_attributes(error: BaseException) -> dict[str, Any]:
    """Return the attributes of an exception that can be pickled."""
    found = {}
    for name, value in vars(error).items():
        with contextlib.suppress(Exception):
            pickle.dumps(value)
            found[name] = value
    return found


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
    """Return an exception with the frames of the user's own code only."""
    frames = traceback.extract_tb(error.__traceback__)
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), os.path.dirname(__file__)}
    others = (*installed, sysconfig.get_path("stdlib"), "<frozen")
    mine = [f for f in frames if not f.filename.startswith(others) and "/__autograph_generated" not in f.filename]
    text = "".join(traceback.format_list(mine[-_MAX_FRAMES:]))
    lines = essential(error)
    name = type(error).__name__.removeprefix("MultilineMessage")  # autograph's of a KeyError
    lines[0] = lines[0].removeprefix(f"{name}: ")
    shown = f"{name}: " + "\n".join(lines)
    made = UserCodeError(
        f"{name}: {lines[0]}",
        rank=rank,
        node=socket.gethostname(),
        cause=f"{type(error).__module__}.{type(error).__qualname__}",
        user_traceback=f"Traceback (most recent call last):\n{text}{shown}" if mine else "\n".join(lines[1:]),
    )
    made.full_traceback = redacted("".join(traceback.format_exception(error)))
    return made.also_as(error)


def essential(error: BaseException) -> list[str]:
    """Return the lines of an exception's message that say what is wrong.

    TensorFlow puts the graph's stack around them, which may take 200 lines, or the frames of a traced function.
    """
    lines = [line.rstrip()[:_MAX_LINE] for line in str(error).strip().splitlines() if line.strip()] or [""]
    if lines[0] == "in user code:":  # TensorFlow's autograph: frames, and the message, which is indented less
        begins = max((i for i, line in enumerate(lines) if line.startswith(("    File ", "      "))), default=0) + 1
        lines = [line[4:] for line in lines[begins:]] or lines
    if type(error).__module__.startswith("tensorflow."):
        noise = ("File ", "Graph execution error", "Detected at", "Node:", "Stack trace for op", "[[", "Original stack")
        kept = [line for line in lines if not line.strip().startswith(noise) and not line.startswith("  ")]
        lines = kept[-1:] or lines
    return lines[:_MAX_LINES]


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
