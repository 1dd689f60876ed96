"""Exceptions survive pickling."""

from __future__ import annotations

import inspect
import pickle

import pytest

from raykeras import errors


@pytest.mark.parametrize(
    "cls",
    [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__],
)
def test_errors_pickle(cls: type[errors.RaykerasError]) -> None:
    options = {"rank": 3, "node": "n", "cause": "ValueError", "user_traceback": "tb"}
    error = cls("why", **options) if cls is errors.UserCodeError else cls("why")  # type: ignore[arg-type]
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, errors.RaykerasError)
    assert (type(copy), str(copy), vars(copy)) == (cls, str(error), vars(error))


def test_validation_errors_are_value_errors() -> None:
    for cls in (errors.OptionError, errors.SourceError, errors.ColumnError, errors.ModelError):
        assert issubclass(cls, ValueError)
    assert not issubclass(errors.UserCodeError, ValueError)


def test_user_code_error_message() -> None:
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
def test_credentials_of_urls_are_not_shown(url: str, shown: str) -> None:
    error = errors.SourceError(f"There is no {url!r}.")
    assert str(error) == f"There is no {shown!r}."
    assert url in shown or "pass" not in repr(error) + str(pickle.loads(pickle.dumps(error)))
    assert errors.redacted(f"from {url} to {url}") == f"from {shown} to {shown}"
