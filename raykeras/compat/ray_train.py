"""Ray Train's `DataParallelTrainer` without the actors and processes that a run does not need.

Every actor and process that is not started makes the workers start sooner:

- `Controller` runs without environment variables, which the workers would inherit. Ray uses the processes that it has
  started in advance only for actors without environment variables.
- `DataContextOnly` passes on the driver's `DataContext` and starts no actor for datasets.
- `NamedGroups` names the placement groups of the workers, so that the driver can remove them if the controller is
  lost, and no cleanup actor is needed.
- `TensorFlowBackend` only sets TF_CONFIG. Ray's own backend also sets TF_USE_LEGACY_KERAS, which rules out Keras 3,
  and imports TensorFlow in the driver and the controller.
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
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Finished workers are noticed at the next check; 2 s by default.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # `raykeras.driver.elastic` watches for draining nodes.
}
"""Environment variables that Ray Train's controller reads when it is created."""


class WorkersTrainer(DataParallelTrainer):
    """Runs a function on every worker. The name of its run must be unique."""

    def fit(self) -> Any:
        try:
            return super().fit()
        except (ControllerError, RayError):
            with contextlib.suppress(Exception):  # The original error is more informative.
                _remove_groups(self.run_config.name)
            raise

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        """Run `Controller` in place of Ray Train's controller, with no environment variables but the user's."""
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
        return [self._replacement_for(callback) for callback in super()._create_default_callbacks()]

    def _replacement_for(self, callback: Any) -> Any:
        if isinstance(callback, DatasetsCallback):
            return DataContextOnly(self.train_run_context, {})
        if isinstance(callback, PlacementGroupCleanerCallback):
            return NamedGroups(self.run_config.name)
        return callback


class Controller(TrainController):
    """Ray Train's controller, which gets its settings without environment variables for its process."""

    def __init__(self, **arguments: Any) -> None:
        # Ray Train turns this warning off by an environment variable.
        logger = logging.getLogger("ray._private.worker")
        logger.addFilter(lambda record: "ray.get inside async actor" not in record.getMessage())
        with _default_environment(CONTROLLER):
            super().__init__(**arguments)


class DataContextOnly(DatasetsCallback):
    """Passes the driver's `DataContext` to the workers, and no datasets."""

    def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
        return {}


class NamedGroups(ControllerCallback):
    """Names the placement groups of the workers after their run.

    It patches the controller's process, which creates no other placement groups.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def after_controller_start(self, train_run_context: Any) -> None:
        from ray.train.v2._internal.execution.worker_group import worker_group as module

        numbers, placement_group = itertools.count(), module.placement_group

        def named(*args: Any, **kwargs: Any) -> Any:
            return placement_group(*args, name=f"{self._name}-{next(numbers)}", **kwargs)

        module.placement_group = named


def _remove_groups(name: str) -> None:
    """Remove the placement groups of a run, which would otherwise live as long as the driver."""
    for group in ray.util.placement_group_table().values():
        if group["name"].startswith(f"{name}-") and group["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))


@contextlib.contextmanager
def _default_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set those variables that are missing from the environment while the block runs."""
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
    """Sets TF_CONFIG to the addresses of all workers."""

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
