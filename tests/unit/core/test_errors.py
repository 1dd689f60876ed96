"""Exceptions survive pickling, are short, and are instances of the class that user code raised."""

from __future__ import annotations

import inspect
import pickle
import sysconfig
from collections.abc import Callable
from typing import Any

import pytest

from raykeras.core import errors
from raykeras.core.error_context import user_code_error


@pytest.mark.parametrize(
    "cls",
    [
        c
        for _, c in inspect.getmembers(errors, inspect.isclass)
        if issubclass(c, errors.RaykerasError) and c.__name__[0] != "_"
    ],
)
def test_errors_survive_pickling(cls: type[errors.RaykerasError]) -> None:
    options = {"rank": 3, "node": "n", "cause": "ValueError", "user_traceback": "tb"}
    error = cls("why", **options) if cls is errors.UserCodeError else cls("why")  # type: ignore[arg-type]
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, errors.RaykerasError)
    assert (type(copy), str(copy), vars(copy)) == (cls, str(error), vars(error))


def test_validation_errors_are_value_errors() -> None:
    for cls in (errors.OptionError, errors.SourceError, errors.ColumnError, errors.ModelError):
        assert issubclass(cls, ValueError)
    assert not issubclass(errors.UserCodeError, ValueError)


def test_user_code_error_message_names_rank_and_node() -> None:
    error = errors.UserCodeError("KeyError: 'a'", rank=2, node="gpu-7", cause="KeyError", user_traceback="File x")
    assert str(error) == "KeyError: 'a'\n(on rank 2, node gpu-7)\nFile x"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://user:pass@host/a.parquet", "ftp://***@host/a.parquet"),
        ("s3://key:sec/ret@bucket/a", "s3://***@bucket/a"),
        ("sftp://user@host/a", "sftp://***@host/a"),
        ("https://host/a.parquet?X-Amz-Signature=abc&X-Amz-Expires=9", "https://host/a.parquet?***"),
        ("s3://bucket/name@example/a", "s3://bucket/name@example/a"),
        ("/folder/user:name@host?x", "/folder/user:name@host?x"),
    ],
)
def test_credentials_in_urls_are_redacted(url: str, shown: str) -> None:
    error = errors.SourceError(f"There is no {url!r}.")
    assert str(error) == f"There is no {shown!r}."
    assert url in shown or "pass" not in repr(error) + str(pickle.loads(pickle.dumps(error)))
    assert errors.redacted(f"from {url} to {url}") == f"from {shown} to {shown}"


class QuotaError(Exception):
    """An exception whose constructor does not take its `args`."""

    def __init__(self, bucket: str, *, limit: int) -> None:
        super().__init__(f"{bucket} holds {limit} objects")
        self.limit = limit


def raised(function: Callable[[], Any]) -> errors.UserCodeError:
    """Return the error that `fit` raises when a function fails."""
    try:
        function()
    except Exception as error:
        return user_code_error(error, 1)
    raise AssertionError


def raise_quota() -> None:
    raise QuotaError("bucket", limit=3)


@pytest.mark.parametrize(
    ("function", "kind", "attributes"),
    [
        (lambda: open("/nowhere/x"), FileNotFoundError, {"errno": 2, "filename": "/nowhere/x"}),  # noqa: SIM115
        (lambda: {}["a"], KeyError, {"args": ("a",)}),
        (lambda: int("x"), ValueError, {}),
        (lambda: b"\xff".decode(), UnicodeDecodeError, {"start": 0}),
        (raise_quota, QuotaError, {"limit": 3}),
    ],
    ids=["OSError", "KeyError", "ValueError", "UnicodeDecodeError", "own"],
)
def test_user_code_error_is_instance_of_original_class(function: Any, kind: Any, attributes: dict[str, Any]) -> None:
    error = raised(function)
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert isinstance(each, errors.UserCodeError) and isinstance(each, kind)
        assert type(each).__name__ == "UserCodeError" and each.rank == 1
        assert str(each) == str(error) and str(each).startswith(f"{kind.__name__}: ")
        assert {name: getattr(each, name) for name in attributes} == attributes


def test_user_code_error_unpickles_without_original_class() -> None:
    error = raised(raise_quota)
    rebuild, (_, *arguments) = error.__reduce__()
    copy = rebuild(b"not a pickle", *arguments)
    assert type(copy) is errors.UserCodeError and str(copy) == str(error) and copy.rank == 1
    assert type(raised(lambda: next(iter(())))) is errors.UserCodeError  # StopIteration would end an iteration


def test_long_messages_are_shortened() -> None:
    def fail() -> None:
        raise ValueError("\n".join(f"{'x' * 2000} {i}" for i in range(300)))

    lines = str(raised(fail)).splitlines()
    assert len(lines) <= 15 and max(map(len, lines)) < 600


IN_USER_CODE = """in user code:

    File "{installed}/tf_keras/src/engine/training.py", line 1398, in train_function  *
        return step_function(self, iterator)
    File "/home/me/model.py", line 11, in train_step
        raise ValueError(

    ValueError: No such label.
    Give another one.
"""


def test_message_of_traced_function_is_last_paragraph() -> None:
    error = user_code_error(ValueError(IN_USER_CODE.format(installed=sysconfig.get_path("purelib"))), None)
    assert str(error).splitlines()[0] == "ValueError: No such label."
    assert "Give another one." in str(error)
    assert "in user code" not in str(error) and "tf_keras" not in str(error)


IN_LAYER = """in user code:

    File "/lib/tf_keras/training.py", line 1398, in train_function  *
        return step_function(self, iterator)

    ValueError: Exception encountered when calling layer 'measure' (type Measure).

    in user code:

        File "/home/me/model.py", line 3, in call  *
            self.add_metric(tf.reduce_sum(inputs))

        ValueError: Please provide a name for your metric.


    Call arguments received by layer 'measure' (type Measure):
      • inputs=tf.Tensor(shape=(None, 1), dtype=float32)
"""


def test_error_in_layer_names_its_cause() -> None:
    assert str(user_code_error(ValueError(IN_LAYER), None)).splitlines()[0] == (
        "ValueError: Please provide a name for your metric."
    )
