"""The format of `train_state.json`: written with a checksum, and validated when read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from raykeras.core.errors import CheckpointError


def dump_state(state: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the bytes of `train_state.json`.

    Args:
        state: Position, logs and versions; see `raykeras.checkpoint.snapshot`.
        files: Size and CRC-32 of each other file by name, as returned by `raykeras.checkpoint.store.digest_of`.
    """
    text = _dump({**state, "files": files})
    return _dump({**state, "files": files, "checksum": hashlib.sha256(text).hexdigest()})


def parse_state(data: bytes, path: str) -> dict[str, Any]:
    """Return the contents of `train_state.json`.

    Args:
        data: The bytes of the file.
        path: Its path, for error messages.

    Returns:
        The arguments of `dump_state`: the state, with `files` under "files".

    Raises:
        CheckpointError: The bytes were not written by `dump_state`, or were changed.
    """
    try:
        state = dict(json.loads(data))
        checksum = state.pop("checksum")
        before, line, after = data.partition(f'\n "checksum": "{checksum}",'.encode())  # Another key always follows.
        if not line or hashlib.sha256(before + after).hexdigest() != checksum:
            raise ValueError("its checksum does not match")
        for name, (is_valid, expected) in _FIELDS.items():
            if not is_valid(state[name]):
                raise ValueError(f"`{name}` must be {expected}; got {state[name]!r:.80}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from None
    return state


def _dump(state: Mapping[str, Any]) -> bytes:
    return json.dumps(state, indent=1, sort_keys=True).encode()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_logs(value: Any) -> bool:
    return type(value) is dict and all(map(_is_number, value.values()))


def _is_number(value: Any) -> bool:
    """Return whether a value is a number or a nested list of numbers."""
    return all(map(_is_number, value)) if type(value) is list else type(value) in (int, float)


def _is_position(value: Any) -> bool:
    if type(value) is not dict:
        return False
    sizes = [value[name] for name in ("num_shards", "window_rows") if value.get(name) is not None]
    return all(_is_count(size) and size for size in sizes)


def _is_files(value: Any) -> bool:
    return type(value) is dict and all(
        re.fullmatch(r"\w[\w.-]*", name)  # no path outside the checkpoint's folder
        and type(file) is dict
        and _is_count(file.get("size"))
        and type(file.get("crc32")) is str
        for name, file in value.items()
    )


def _is_signature(value: Any) -> bool:
    return (
        type(value) is dict and type(value.get("options")) is dict and {"keras", "variables", "optimizer"} <= {*value}
    )


def _is_package(value: Any) -> bool:
    return type(value) is dict and value.get("package") in ("keras", "tf_keras") and type(value.get("version")) is str


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "epoch": (_is_count, "a whole number"),
    "step": (_is_count, "a whole number"),
    "logs": (_is_logs, "numbers by name"),
    "step_logs": (_is_logs, "numbers by name"),
    "position": (_is_position, "the sizes of shards and windows, and what identifies the data"),
    "signature": (_is_signature, "the model's variables and its optimizer"),
    "keras": (_is_package, "a package and its version"),
    "stopped": (lambda value: type(value) is bool, "true or false"),
    "extra": (lambda value: type(value) is list and all(type(name) is str for name in value), "a list of names"),
    "files": (_is_files, "sizes and digests by the names of files"),
}
