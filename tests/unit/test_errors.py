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
