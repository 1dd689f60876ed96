"""Tell temporary storage failures from permanent ones, and retry calls after temporary ones.

fsspec filesystems raise the exceptions of their clients, many of which are not OSErrors. The clients' packages may not
be installed, so exceptions are recognised by the packages and names of their classes and by their error codes.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

_PACKAGES = {
    *("adlfs", "aiobotocore", "aiohttp", "asyncio", "azure", "botocore", "concurrent", "fsspec", "gcsfs", "google"),
    *("http", "requests", "s3fs", "urllib3"),
}
"""Packages whose exceptions are storage or network errors, though not all are OSErrors."""

_PERMANENT_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}

_PERMANENT_STATUS = {401, 403}

_PERMANENT_CODES = {"NoSuchBucket", "InvalidBucketName"}

_PERMANENT_TYPES = {
    *("PermissionError", "IsADirectoryError", "NotADirectoryError"),
    *("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ParamValidationError"),
}

_CORRUPTED_TYPES = {
    *("ChecksumError", "FlexibleChecksumError"),  # gcsfs, botocore
    *("ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ResponseStreamingError", "ContentDecodingError"),
}

READ_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
"""Seconds between the attempts of a call that blocks its caller."""

T = TypeVar("T")


def is_storage_error(error: BaseException) -> bool:
    """Return whether an exception comes from storage or a network, rather than from a bug."""
    packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return isinstance(error, OSError) or bool(_PACKAGES & packages)


def is_temporary(error: BaseException) -> bool:
    """Return whether storage failed temporarily, not for lack of permissions, credentials, a bucket or space."""
    chain = list(_chain(error))
    return any(map(is_storage_error, chain)) and not any(map(_is_permanent, chain))


def is_corrupted(error: BaseException) -> bool:
    """Return whether the data that storage sent was truncated or did not match its checksum."""
    return any(_CORRUPTED_TYPES & _names(cause) for cause in _chain(error))


def retry(call: Callable[[], T], pauses_s: Sequence[float] | None = None) -> T:
    """Call a function again while it fails temporarily.

    Args:
        call: The function; may be called several times.
        pauses_s: Seconds between the attempts. Defaults to `READ_PAUSES_S`.

    Returns:
        What the function returned.

    Raises:
        Exception: Whatever the last attempt raised.
    """
    for pause_s in READ_PAUSES_S if pauses_s is None else pauses_s:
        try:
            return call()
        except Exception as error:
            if not is_temporary(error):
                raise
        time.sleep(pause_s)
    return call()


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its chain of explicit causes."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def _names(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def _is_permanent(error: BaseException) -> bool:
    response: Any = getattr(error, "response", None)
    codes = response.get("Error", {}).get("Code") if isinstance(response, dict) else None  # botocore
    status = getattr(error, "code", None) or getattr(error, "status", None)  # gcsfs and google; aiohttp
    return bool(
        getattr(error, "errno", None) in _PERMANENT_ERRNOS
        or str(status) in {str(number) for number in _PERMANENT_STATUS}
        or codes in _PERMANENT_CODES
        or _PERMANENT_TYPES & _names(error)
    )
