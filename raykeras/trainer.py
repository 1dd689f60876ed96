"""Ray Train's trainer, with nothing started that a raykeras run does not use.

Enters: a function for every worker, and how many there are. Leaves: Ray Train's `DataParallelTrainer`.

It comes with three things that are not there by default:

    TensorFlowBackend   sets TF_CONFIG and nothing else. `ray.train.tensorflow`'s also sets
                        TF_USE_LEGACY_KERAS, and imports TensorFlow in the driver and in the controller
    DataContextOnly     hands on the driver's `DataContext`, and starts no actor for datasets that are none
    CONTROLLER          how often it looks at the workers, and that it need not watch nodes that are about
                        to go: `raykeras.world` does

Each actor that is not started saves two seconds of a core, of those that the workers need to start.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

CONTROLLER: Mapping[str, str] = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a worker's end waits for a look, by default up to 2 s
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Environment variables that Ray Train hands to its controller."""


class WorkersTrainer(DataParallelTrainer):
    """Runs a function on every worker."""

    def fit(self) -> Any:
        with _set_by_default(CONTROLLER):
            return super().fit()

    def _create_default_callbacks(self) -> list[Any]:
        return [
            DataContextOnly(self.train_run_context, {}) if isinstance(callback, DatasetsCallback) else callback
            for callback in super()._create_default_callbacks()
        ]


class DataContextOnly(DatasetsCallback):
    """Hands the driver's `DataContext` to the workers."""

    def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
        return {}


@contextlib.contextmanager
def _set_by_default(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables within it, but for those that the user set."""
    unset = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


@dataclass
class TensorFlowBackendConfig(BackendConfig):
    """Selects `TensorFlowBackend`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return TensorFlowBackend


class TensorFlowBackend(Backend):
    """Tells every worker the addresses of all."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        addresses = worker_group.execute(_free_address)
        ray.get(
            [
                worker_group.execute_single_async(rank, _set_tf_config, addresses, rank)
                for rank in range(len(worker_group))
            ]
        )


def _free_address() -> str:
    from ray.train._internal.utils import get_address_and_port

    host, port = get_address_and_port()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _set_tf_config(addresses: list[str], rank: int) -> None:
    if len(addresses) > 1:
        cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        os.environ["TF_CONFIG"] = json.dumps(cluster)
