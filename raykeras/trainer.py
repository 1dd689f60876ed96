"""Ray Train's trainer, with nothing started that a raykeras run does not use.

Enters: a function for every worker, and how many there are. Leaves: Ray Train's `DataParallelTrainer`.

It comes with five things that are not there by default:

    TensorFlowBackend   sets TF_CONFIG and nothing else. `ray.train.tensorflow`'s also sets
                        TF_USE_LEGACY_KERAS, and imports TensorFlow in the driver and in the controller
    DataContextOnly     hands on the driver's `DataContext`, and starts no actor for datasets that are none
    NamedGroups         names the workers' placement groups, so that the driver can remove what is left of
                        them when the controller is lost, and no actor needs to
    Controller          has no environment variables of its own, and neither have the workers: only then does Ray
                        take processes for them that it started ahead, as it does with its nodes
    CONTROLLER          how often it looks at the workers, and that it need not watch nodes that are about
                        to go: `raykeras.world` does

Each actor that is not started saves two seconds of a core, of those that the workers need to start, and each process
that was not started in vain one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError

CONTROLLER: Mapping[str, str] = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a worker's end waits for a look, by default up to 2 s
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Environment variables that Ray Train's controller reads when it is made."""


class WorkersTrainer(DataParallelTrainer):
    """Runs a function on every worker. Its run must have a name that no other has."""

    def fit(self) -> Any:
        try:
            return super().fit()
        except (ControllerError, RayError):
            with contextlib.suppress(Exception):  # what is raised tells more
                _remove_groups(self.run_config.name)
            raise

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        """As Ray Train's, but for the class; the user's own variables are handed on."""
        env_vars = get_env_vars_to_propagate()
        controller = (
            ray.remote(Controller)
            .options(
                num_cpus=0,
                label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
                runtime_env={"env_vars": env_vars} if env_vars else None,
            )
            .remote(**arguments)
        )
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())

    def _create_default_callbacks(self) -> list[Any]:
        return [self._instead_of(callback) for callback in super()._create_default_callbacks()]

    def _instead_of(self, callback: Any) -> Any:
        if isinstance(callback, DatasetsCallback):
            return DataContextOnly(self.train_run_context, {})
        if isinstance(callback, PlacementGroupCleanerCallback):
            return NamedGroups(self.run_config.name)
        return callback


class Controller(TrainController):
    """Ray Train's, in a process without environment variables of its own: they would be the workers', too."""

    def __init__(self, **arguments: Any) -> None:
        # a warning that Ray Train turns off by a variable
        logger = logging.getLogger("ray._private.worker")
        logger.addFilter(lambda record: "ray.get inside async actor" not in record.getMessage())
        with _set_by_default(CONTROLLER):
            super().__init__(**arguments)


class DataContextOnly(DatasetsCallback):
    """Hands the driver's `DataContext` to the workers."""

    def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
        return {}


class NamedGroups(ControllerCallback):
    """Names placement groups after their run. In the controller's process, which makes no others."""

    def __init__(self, name: str) -> None:
        self._name = name

    def after_controller_start(self, train_run_context: Any) -> None:
        from ray.train.v2._internal.execution.worker_group import worker_group as module

        numbers, placement_group = itertools.count(), module.placement_group

        def named(*args: Any, **kwargs: Any) -> Any:
            return placement_group(*args, name=f"{self._name}-{next(numbers)}", **kwargs)

        module.placement_group = named


def _remove_groups(name: str) -> None:
    """Ray keeps the groups of an actor that is gone until the driver is gone, too."""
    for group in ray.util.placement_group_table().values():
        if group["name"].startswith(f"{name}-") and group["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))


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
