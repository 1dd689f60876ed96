"""What a run was: `run.json` in its folder, with one entry per call of `fit`."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

from raykeras.compat.ray_state import num_gpus_here
from raykeras.core import events
from raykeras.core.events import Event
from raykeras.core.installed import installed_versions
from raykeras.core.plain_values import masked, masked_command, plain_value
from raykeras.data.adapters.adapter import Batches
from raykeras.data.inputs import OpenData
from raykeras.data.sources.base import OpenSource, Source

RECORD_FILE = "run.json"

_MAX_FILES = 5  # whose paths are recorded

_GIT_TIMEOUT_S = 5.0

_PIPELINE: ContextVar[dict[str, Any] | None] = ContextVar("pipeline", default=None)
"""The pipeline that calls `fit`, as `run.json` records it."""


@contextlib.contextmanager
def called_by_pipeline(path: str, parameters: Mapping[str, str]) -> Iterator[None]:
    """Record that calls of `fit` in the block are those of a pipeline file.

    Args:
        path: Path of the file.
        parameters: What `-s` set, as text.
    """
    token = _PIPELINE.set({"file": os.path.abspath(path), "parameters": plain_value(masked(parameters))})
    try:
        yield
    finally:
        _PIPELINE.reset(token)


class RunRecord:
    """An event handler that writes `run.json`.

    Args:
        folder: Local folder of the file, which may have the entries of earlier calls.
        call: What `call_record` returned.
    """

    def __init__(self, folder: str, call: Mapping[str, Any]) -> None:
        self._path = os.path.join(folder, RECORD_FILE)
        self._call = dict(call)
        self._values: dict[str, Any] | None = None
        pipeline = call["pipeline"]
        # in a thread, because the status of a large repository takes seconds
        self._git: Future[Any] | None = _in_thread(
            git_state, os.path.dirname(pipeline["file"]) if pipeline else os.getcwd()
        )

    def __call__(self, event: Event) -> None:
        if self._values is None:
            self._values = {"calls": [], **parse_record(_read(self._path))}
            self._values["calls"] = [*self._values["calls"], self._call]
            self._write()
        if isinstance(event, events.RunStarted) and event.model:
            self._values["model"] = event.model
            self._write()
        if self._git is not None and (self._git.done() or isinstance(event, events.RunEnded)):
            self._call["git"], self._git = self._git.result(), None
            self._write()

    def _write(self) -> None:
        partial = f"{self._path}.partial"
        with open(partial, "w", encoding="utf-8", errors="replace") as file:
            json.dump(self._values, file, indent=1, ensure_ascii=False)
        os.replace(partial, self._path)  # atomic, since the file may be uploading


def parse_record(text: str) -> dict[str, Any]:
    """Return the contents of a `run.json`, which may come from anyone; what is not valid is left out."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    record: dict[str, Any] = {}
    if isinstance(values, dict):
        if isinstance(values.get("calls"), list):
            record["calls"] = [call for call in values["calls"] if isinstance(call, dict)]
        if isinstance(values.get("model"), dict):
            record["model"] = values["model"]
    return record


def call_record(
    arguments: Mapping[str, Any],
    *,
    model: Any,
    data: OpenData,
    validation: OpenData | None,
    callbacks: Sequence[Any],
) -> dict[str, Any]:
    """Return what a call of `fit` was.

    Args:
        arguments: The arguments of `fit` other than the model, the data and the callbacks.
        model: The model, or the function that builds it.
        data: The training data.
        validation: The validation data.
        callbacks: The callbacks.
    """
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": masked_command(sys.argv),
        "folder": os.getcwd(),
        "pipeline": _PIPELINE.get(),
        "arguments": plain_value(arguments),
        "model": getattr(model, "__qualname__", type(model).__name__),
        "callbacks": [type(callback).__name__ for callback in callbacks],
        "data": {"train": _data_record(data), "validation": None if validation is None else _data_record(validation)},
        "git": None,  # until it is known
        "versions": versions(),
        "nodes": nodes(),
    }


def _data_record(data: OpenData) -> dict[str, Any]:
    if isinstance(data, Batches):
        return {"kind": data.type_name, "batches": data.num_batches}
    return {"kind": type(data.source).__name__, **_columns_record(data.source), **_contents_record(data.opened)}


def _columns_record(source: Source) -> dict[str, Any]:
    names = ("x", "y", "sample_weight", "columns", "pad", "ragged", "fill", "cache")
    record = {name: plain_value(getattr(source, name)) for name in names if getattr(source, name)}
    if source.transform is not None:
        record["transform"] = getattr(source.transform, "__qualname__", type(source.transform).__name__)
    return record


def _contents_record(opened: OpenSource) -> dict[str, Any]:
    files = [path for path in opened.files if path]
    return {
        "rows": opened.num_rows,
        "files": len(files),
        "first_files": plain_value(files[:_MAX_FILES]),
        "schema": {field.name: [field.kind, field.dtype, list(field.shape)] for field in opened.fields.values()},
        "fingerprint": opened.fingerprint,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, raykeras and the installed packages that it uses."""
    return {name.lower(): version for name, version in installed_versions().items() if version is not None}


def nodes() -> list[dict[str, Any]]:
    """Return the name, the resources and the kinds of accelerators of each node: of the Ray cluster if connected."""
    import ray

    if not ray.is_initialized():
        resources = {"CPU": float(os.cpu_count() or 1), "GPU": float(num_gpus_here())}
        return [{"node": platform.node(), "resources": resources, "accelerators": []}]
    kind = "accelerator_type:"
    return [
        {
            "node": node["NodeManagerHostname"],
            "resources": {name: node["Resources"].get(name, 0.0) for name in ("CPU", "GPU", "memory")},
            "accelerators": sorted(name.removeprefix(kind) for name in node["Resources"] if name.startswith(kind)),
        }
        for node in ray.nodes()
        if node["Alive"]
    ]


def git_state(folder: str) -> dict[str, Any] | None:
    """Return the commit of a folder, and whether files differ from it; None outside of a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: str, *arguments: str) -> str | None:
    """Return the output of a git command that writes nothing; None if it fails or takes too long."""
    command = ["git", "--no-optional-locks", "-C", folder, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return done.stdout.strip()


def _in_thread(function: Any, *arguments: Any) -> Future[Any]:
    """Call a function in a thread that ends with it."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="raykeras-record")
    future = pool.submit(function, *arguments)
    pool.shutdown(wait=False)
    return future


def _read(path: str) -> str:
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
