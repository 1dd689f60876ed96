"""Which storage failures are temporary: of S3 as s3fs raises them, of other filesystems by the name of the class."""

from __future__ import annotations

import errno
from typing import Any

import fsspec
import pytest

from raykeras.core import storage_errors
from raykeras.core.errors import CheckpointError
from raykeras.core.storage_errors import is_corrupted, is_temporary, retry
from tests.support.s3 import S3


def error_of(package: str, *names: str, **attributes: Any) -> Exception:
    """Return an exception of a package that need not be installed; `names` are of its class and then of its bases."""
    cls: type[Exception] = Exception
    for name in reversed(names):
        cls = type(name, (cls,), {"__module__": f"{package}.errors"})
    error = cls("as raised")
    vars(error).update(attributes)
    return error


@pytest.fixture
def fail_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit s3fs to one attempt and one second."""
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1}})


@pytest.mark.usefixtures("fail_fast")
def test_s3_failures_are_classified(s3_server: S3, bucket: str) -> None:
    fs = fsspec.filesystem("s3")
    fs.pipe_file(f"{bucket}/x", b"x" * 100)
    found = {}
    for fault in ("unavailable", "dropped", "short", "garbled", "hangs", "expired", "denied"):
        with s3_server.failing(fault, method="GET", path="/x"), pytest.raises(Exception) as raised:
            fs.cat_file(f"{bucket}/x")
        found[fault] = (is_temporary(raised.value), is_corrupted(raised.value))
    assert found == {
        "unavailable": (True, False),
        "dropped": (True, False),
        "short": (True, True),
        "garbled": (True, True),
        "hangs": (True, False),
        "expired": (False, False),
        "denied": (False, False),
    }
    with pytest.raises(FileNotFoundError) as missing:
        fs.pipe_file("s3://no-such-bucket/x", b"")
    assert not is_temporary(missing.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (error_of("gcsfs", "HttpError", code=503), True),
        (error_of("gcsfs", "HttpError", code="401"), False),
        (error_of("google.auth", "TransportError", "GoogleAuthError"), True),
        (error_of("google.auth", "DefaultCredentialsError", "GoogleAuthError"), False),
        (error_of("aiohttp", "ClientOSError", "ClientError"), True),
        (error_of("botocore", "NoCredentialsError", "BotoCoreError"), False),
        (error_of("mypackage", "ClientError"), False),
        (OSError("storage is unavailable"), True),
        (OSError(errno.ENOSPC, "no space left"), False),
        (OSError(errno.EROFS, "read-only"), False),
        (PermissionError("not yours"), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (ValueError("a mistake"), False),
    ],
    ids=repr,
)
def test_failures_are_classified_by_type_and_code(error: Exception, expected: bool) -> None:
    assert is_temporary(error) == expected
    wrapped = CheckpointError("could not be written")
    wrapped.__cause__ = error
    assert is_temporary(wrapped) == expected
    assert not is_temporary(CheckpointError("another driver has taken over"))


def test_only_temporary_failures_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_errors, "READ_PAUSES_S", (0.0, 0.0))
    for errors, num_calls in (([OSError("unavailable")] * 2, 3), ([OSError("unavailable"), PermissionError()], 2)):
        left = list(errors)
        calls = []

        def call(left: list[Exception] = left, calls: list[int] = calls) -> str:
            calls.append(1)
            if left:
                raise left.pop(0)
            return "read"

        if num_calls == 3:
            assert retry(call) == "read"
        else:
            with pytest.raises(PermissionError):
                retry(call)
        assert len(calls) == num_calls
