"""Ray's API over the simulated cluster, and the replacement of what the code of raykeras stands on."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
import time
import types
import warnings
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import raykeras.compat
import raykeras.worker
from raykeras.compat import ray_state
from raykeras.driver import event_log, worker_pool
from raykeras.worker import checkpointer, entry, job_loop, session, watchdog
from tests.simulation import cluster as simulated
from tests.simulation import primitives, training
from tests.simulation.cluster import cluster
from tests.simulation.primitives import scheduler

_PRIMITIVES = {
    "threading": (threading, primitives.ThreadingModule),
    "time": (time, primitives.TimeModule),
    "queue": (queue, primitives.QueueModule),
    "asyncio": (asyncio, primitives.AsyncioModule),
    "signal": (signal, primitives.SignalModule),
}
"""The modules that the code of raykeras uses, and what simulated processes see instead."""


def _module(name: str, **names: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(names)
    return module


def _remote(*args: Any, **options: Any) -> Any:
    """`ray.remote` of an actor's class."""

    def with_options(cls: type) -> Any:
        return types.SimpleNamespace(remote=lambda *values: cluster().start_actor(cls, options, values))

    return with_options(args[0]) if args else with_options


def _wait(refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
    return (refs, []) if cluster().is_ready_within(refs[0], timeout) else ([], refs)


class _RuntimeContext:
    gcs_address = "simulated"

    def get_job_id(self) -> str:
        return _job().name

    def get_node_id(self) -> str:
        return str(scheduler().process.node.id)

    should_capture_child_tasks_in_placement_group = False


class _DataContext:
    @staticmethod
    def get_current() -> str:
        return ""


def _job() -> Any:
    process = scheduler().process
    return process.job or process


def _nodes() -> list[dict[str, Any]]:
    return [{"NodeID": node.id, "Alive": node.is_alive, "Resources": {"CPU": node.cpus}} for node in cluster().nodes]


def _cluster_resources() -> dict[str, float]:
    return {"CPU": sum(node.cpus for node in cluster().nodes if node.is_alive)}


def _free_resources_per_node() -> dict[str, dict[str, float]]:
    return {node.id: {"CPU": node.free} for node in cluster().nodes if node.is_alive}


def _draining_nodes() -> set[str]:
    return {node.id for node in cluster().nodes if node.is_draining}


def _waits_for_resources() -> bool:
    return any(not group.nodes and not group.is_removed for group in cluster().groups)


@dataclass(frozen=True)
class _ReservedBundles:
    group: Any
    indices: tuple[int, ...]


class _ProcessState:
    """Stands for what a job leaves behind in TensorFlow and Keras."""

    def add(self, api: Any) -> None:
        pass

    def restore(self) -> None:
        pass


class _OfProcess(MutableMapping[Any, Any]):
    """A global dict of a module, of which each simulated process has its own."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def _own(self) -> dict[Any, Any]:
        own: dict[Any, Any] = scheduler().process.globals.setdefault(self._name, {})
        return own

    def __getitem__(self, key: Any) -> Any:
        return self._own[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._own[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._own[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


class _FilesWithVersions:
    """The module `os`, with files whose modification times differ if their contents do: real clocks are too coarse."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    @staticmethod
    def stat(path: str) -> Any:
        with open(path, "rb") as file:
            return types.SimpleNamespace(st_size=os.path.getsize(path), st_mtime_ns=zlib.crc32(file.read()))


def _ray_modules() -> dict[str, types.ModuleType]:
    exceptions = _module(
        "ray.exceptions",
        RayError=simulated.RayError,
        RayTaskError=simulated.RayTaskError,
        RaySystemError=simulated.RaySystemError,
    )
    namespace = types.SimpleNamespace
    train = _module(
        "ray.train",
        ControllerError=simulated.ControllerError,
        WorkerGroupError=simulated.WorkerGroupError,
        FailureConfig=namespace,
        RunConfig=namespace,
        ScalingConfig=namespace,
        get_context=lambda: namespace(get_world_rank=lambda: scheduler().process.globals["rank"]),
    )
    collective = _module("ray.train.collective", broadcast_from_rank_zero=None)
    train.collective = collective
    util = _module(
        "ray.util",
        get_current_placement_group=lambda: None,
        get_node_ip_address=lambda: "127.0.0.1",
        placement_group=lambda bundles, **options: simulated.PlacementGroup(cluster(), bundles),
        remove_placement_group=lambda group: cluster().remove_group(group),
    )
    data = _module("ray.data", DataContext=_DataContext)
    sdk = _module("ray.autoscaler.sdk", request_resources=lambda **options: None)
    ray = _module(
        "ray",
        cloudpickle=namespace(CloudPickler=pickle.Pickler, dumps=pickle.dumps, loads=pickle.loads),
        cluster_resources=_cluster_resources,
        data=data,
        exceptions=exceptions,
        get=lambda refs: cluster().get(refs),
        get_runtime_context=_RuntimeContext,
        is_initialized=lambda: True,
        kill=lambda handle: cluster().end(handle.actor.process),
        nodes=_nodes,
        put=lambda value: cluster().put(value),
        remote=_remote,
        train=train,
        util=util,
        wait=_wait,
    )
    compat = _module(
        "raykeras.compat.ray_train",
        PREEMPTION_ERRORS=(),
        ReservedBundles=_ReservedBundles,
        can_place_in_bundles=lambda: True,
        exceptions_of_workers=lambda error: error.worker_failures,
        no_restarts=lambda controller_failure_limit: None,
        run_on_workers=lambda *args: cluster().run_on_workers(*args),
        stop=lambda name: cluster().stop_run(name),
    )
    modules = [ray, exceptions, train, collective, util, data, sdk, _module("ray.autoscaler"), compat]
    modules.append(_module("raykeras.worker.process_state", ProcessState=_ProcessState))
    return {module.__name__: module for module in modules}


@contextlib.contextmanager
def _imported(modules: Mapping[str, Any]) -> Iterator[None]:
    """Let `import` find these modules while the block runs, and keep all others that it imports."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Let the code of raykeras run on simulated threads, clocks, signals, Ray and Keras while the block runs."""

    def nothing(*args: Any) -> None:
        pass

    modules = _ray_modules()
    state = {
        "free_resources_per_node": (ray_state.free_resources_per_node, _free_resources_per_node),
        "draining_nodes": (ray_state.draining_nodes, _draining_nodes),
        "waits_for_resources": (ray_state.waits_for_resources, _waits_for_resources),
    }
    replaced: list[tuple[Any, str, Any]] = [
        (module, name, replacement)
        for module in [module for name, module in sys.modules.items() if name.startswith("raykeras.")]
        for name, (real, replacement) in {**_PRIMITIVES, **state}.items()
        if getattr(module, name, None) is real
    ]
    replaced += [(module, name, nothing) for module in (entry, job_loop) for name in ("quiet", "import_tensorflow")]
    replaced += [
        (checkpointer, "take_snapshot", training.take_snapshot),
        (session, "restore", training.restore),
        (session, "restore_metrics", training.restore_metrics),
        (entry, "end_process", lambda: cluster().end(scheduler().process)),
        (watchdog, "_stacks", str),
        (event_log, "os", _FilesWithVersions()),
        (worker_pool, "_idle", _OfProcess("idle workers")),
        (worker_pool, "_SPARES_AFTER_S", 1.0),  # or runs would end before
        (raykeras.compat, "ray_train", modules["raykeras.compat.ray_train"]),
        (raykeras.worker, "train", training),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_imported({**modules, "raykeras.worker.train": training, "tensorflow": None}))
        stack.enter_context(mock.patch.dict(os.environ))
        for module, name, value in replaced:
            stack.enter_context(mock.patch.object(module, name, value, create=True))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        logger = logging.getLogger("raykeras")
        stack.enter_context(mock.patch.object(logger, "disabled", True))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="raykeras-simulation-"))
        stack.enter_context(mock.patch.object(tempfile, "tempdir", folder))
        yield
