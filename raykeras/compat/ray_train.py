"""Run a function on workers with Ray Train, without the actors and processes that a run does not need.

Every actor and process that is not started makes the workers start sooner:

- Ray Train's controller runs without environment variables, which the workers would inherit. Ray uses the processes
  that it has started in advance only for actors without environment variables.
- The driver's `DataContext` is passed on, but no actor for datasets is started.
- Workers are placed in a placement group that exists, such as that of a Ray Tune trial, and that outlives them: those
  that replace them after a failure need not wait for resources. Ray Train, which creates and removes a group of its
  own, gets one that reserves nothing.
- The placement groups of the workers are named, so that the driver can remove them if the controller is lost, and no
  cleanup actor is needed. Ray Train's own needs Ray's dashboard, which raykeras does not start.
- Ray's own backend for TensorFlow is not used. It imports TensorFlow in the driver and the controller, and sets
  TF_USE_LEGACY_KERAS, which rules out Keras 3. `raykeras.worker.job_loop` sets TF_CONFIG.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RaySystemError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raykeras.compat.patch import default_environment, patched
from raykeras.compat.versions import PrivateName

TRAINER = PrivateName(
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer",
    "run a function on workers",
)

START_CONTROLLER = PrivateName(
    "ray.train.v2.api.data_parallel_trainer:DataParallelTrainer._initialize_and_run_controller",
    "start Ray Train's controller without environment variables",
    "the workers start some seconds later",
    parameters=("self",),
)

CONTROLLER = PrivateName(
    "ray.train.v2._internal.execution.controller:TrainController",
    "start Ray Train's controller without environment variables",
    "the workers start some seconds later",
)

DATASETS_CALLBACK = PrivateName(
    "ray.train.v2._internal.callbacks:DatasetsCallback",
    "start no actor for datasets",
    "an actor is started that is not used",
    since="2.54",
)

CLEANER_CALLBACK = PrivateName(
    "ray.train.v2._internal.callbacks.placement_group_callback:PlacementGroupCleanerCallback",
    "start no actor that removes placement groups",
    "an actor is started that is not used",
    since="2.53",
)

PLACEMENT_GROUP = PrivateName(
    "ray.train.v2._internal.execution.worker_group.worker_group:placement_group",
    "place workers in a reservation that outlives them",
    "there are no spares for lost workers, and workers do not use the placement group of a Ray Tune trial",
    parameters=("bundles", "strategy", "name"),
)

SETTINGS: Mapping[str, str] = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Finished workers are noticed at the next check; 2 s by default.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # `raykeras.driver.elastic` watches for draining nodes.
}
"""Environment variables that Ray Train's controller reads when it is created."""

_POLL_S = 1.0

PREEMPTION_ERRORS: tuple[type[Exception], ...] = (
    (ray.train.PreemptionError,) if hasattr(ray.train, "PreemptionError") else ()
)
"""What Ray Train raises if a node is preempted; Ray 2.57 and earlier raise that its workers failed."""


def no_restarts(controller_failure_limit: int) -> FailureConfig:
    """Return a configuration with which Ray Train never starts failed workers again.

    Args:
        controller_failure_limit: How often the controller may fail to start the workers; -1 for any number.
    """
    options = {"max_failures": 0, "max_preemption_failures": 0, "controller_failure_limit": controller_failure_limit}
    known = {field.name for field in dataclasses.fields(FailureConfig)}  # Ray 2.57 and earlier lack the second
    return FailureConfig(**{name: value for name, value in options.items() if name in known})


def can_place_in_bundles() -> bool:
    """Return whether workers can be placed in an existing placement group."""
    return all(name.find() is not None for name in (START_CONTROLLER, CONTROLLER, PLACEMENT_GROUP))


def run_here(work: Callable[[], Any]) -> Any:
    """Run `work` in this process, as Ray Train's only worker; return its value."""
    values: list[Any] = []
    run_config = RunConfig(name="raykeras", storage_path=tempfile.gettempdir())
    scaling_config = ScalingConfig(num_workers=0)
    TRAINER.get()(lambda: values.append(work()), scaling_config=scaling_config, run_config=run_config).fit()
    return values[0]


@dataclass(frozen=True)
class ReservedBundles:
    """Where to place workers in an existing placement group.

    Attributes:
        group: The placement group.
        indices: Index of each worker's bundle.
    """

    group: PlacementGroup
    indices: tuple[int, ...]


def run_on_workers(
    work: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    scaling_config: ScalingConfig,
    run_config: RunConfig,
    bundles: ReservedBundles | None = None,
) -> None:
    """Run `work(config)` on every worker, until it returns or `stop` is called.

    Args:
        work: The function.
        config: Its argument.
        scaling_config: The workers and the resources of each.
        run_config: Its name must be unique.
        bundles: Where to place the workers; None to reserve a new placement group.
    """
    trainer = TRAINER.get()(
        work,
        train_loop_config=config,
        scaling_config=scaling_config,
        run_config=run_config,
    )
    settings = SETTINGS
    if START_CONTROLLER.find() and (controller := CONTROLLER.find()):
        trainer._initialize_and_run_controller = functools.partial(
            _run_controller, _quick_controller(controller, bundles)
        )
        settings = {}
    try:
        with default_environment(settings):  # which Ray Train passes on to its controller and the workers
            trainer.fit()
    except (ControllerError, RayError):
        with contextlib.suppress(Exception):  # The original error is more informative.
            _remove_groups(run_config.name)
        raise


def stop(name: str) -> None:
    """End the workers of a run at once; does nothing if they have ended.

    Args:
        name: Name in the run's configuration.
    """
    if ray.is_initialized():
        with contextlib.suppress(ValueError):  # there is no such controller
            ray.kill(ray.get_actor(name))


def exceptions_of_workers(error: WorkerGroupError) -> dict[int, BaseException]:
    """Return the exception of each failed worker, by rank. Ray 2.54 and earlier wrap those of the function it runs."""
    return {rank: getattr(failure, "_base_exc", failure) for rank, failure in error.worker_failures.items()}


def _this_node() -> dict[str, str]:
    """Return a label selector for this node."""
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def _run_controller(controller_class: type, **arguments: Any) -> Any:
    """Run a controller on this node, with no environment variables but the user's."""
    env_vars = {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}
    arguments["callbacks"] = _needed(arguments["callbacks"])
    controller = (
        ray.remote(controller_class)
        .options(
            name=arguments["train_run_context"].run_config.name,
            num_cpus=0,
            label_selector=_this_node(),
            runtime_env={"env_vars": env_vars} if env_vars else None,
        )
        .remote(**arguments)
    )
    _wait(controller.run.remote())
    return ray.get(controller.get_result.remote())


def _wait(reference: ray.ObjectRef[Any]) -> None:
    """Wait as `ray.get` does, but outside of Ray: if Ray is shut down during `ray.get`, the process can crash."""
    future, job = reference.future(), ray.get_runtime_context().get_job_id()
    while not concurrent.futures.wait([future], _POLL_S).done:
        if not ray.is_initialized() or ray.get_runtime_context().get_job_id() != job:
            raise RaySystemError("Ray was shut down.")
    future.result()


def _needed(callbacks: Sequence[Any]) -> list[Any]:
    """Return the callbacks that a run needs; that for datasets passes on the `DataContext` only."""
    datasets_callback, cleaner_callback = DATASETS_CALLBACK.find(), CLEANER_CALLBACK.find()
    for callback in callbacks:
        if datasets_callback and isinstance(callback, datasets_callback):
            callback.before_init_train_context = _no_datasets
    can_remove_groups = cleaner_callback and PLACEMENT_GROUP.find()
    return [callback for callback in callbacks if not can_remove_groups or not isinstance(callback, cleaner_callback)]


def _no_datasets(workers: Any) -> dict[str, list[Any]]:
    return {}


def _quick_controller(controller_class: Any, bundles: ReservedBundles | None) -> type:
    """Return Ray Train's controller, which gets its settings without environment variables for its process."""

    class Controller(controller_class):
        def __init__(self, **arguments: Any) -> None:
            # Ray Train turns this warning off by an environment variable.
            logger = logging.getLogger("ray._private.worker")
            logger.addFilter(lambda record: "ray.get inside async actor" not in record.getMessage())
            self._name_of_groups = arguments["train_run_context"].run_config.name
            with default_environment(SETTINGS):
                super().__init__(**arguments)

        async def run(self) -> None:
            with contextlib.ExitStack() as stack:
                if bundles is not None:
                    stack.enter_context(_in_bundles(bundles))
                stack.enter_context(_named_groups(self._name_of_groups))
                await super().run()

    return Controller


@contextlib.contextmanager
def _named_groups(name: str) -> Iterator[None]:
    """Name the placement groups that this process creates after a run while the block runs."""
    placement_group = PLACEMENT_GROUP.find()
    if placement_group is None:
        yield
        return
    numbers = itertools.count()

    def named(*args: Any, **kwargs: Any) -> Any:
        return placement_group(*args, name=f"{name}-{next(numbers)}", **kwargs)

    with PLACEMENT_GROUP.replaced(named):
        yield


@contextlib.contextmanager
def _in_bundles(bundles: ReservedBundles) -> Iterator[None]:
    """Place workers in existing bundles while the block runs, and let Ray Train create groups that reserve nothing."""
    placement_group, init = PLACEMENT_GROUP.find(), PlacementGroupSchedulingStrategy.__init__
    if placement_group is None:
        yield
        return
    groups: set[PlacementGroup] = set()

    def without_resources(*args: Any, name: str = "", **kwargs: Any) -> Any:
        groups.add(group := placement_group([{f"node:{ray.util.get_node_ip_address()}": 0.0001}], name=name))
        return group

    def init_in_bundle(strategy: Any, *args: Any, **kwargs: Any) -> None:
        init(strategy, *args, **kwargs)
        if strategy.placement_group in groups:
            strategy.placement_group = bundles.group
            strategy.placement_group_bundle_index = bundles.indices[strategy.placement_group_bundle_index]
            strategy.placement_group_capture_child_tasks = False  # the bundles are full

    with (
        PLACEMENT_GROUP.replaced(without_resources),
        patched(PlacementGroupSchedulingStrategy, "__init__", init_in_bundle),
    ):
        yield


def _remove_groups(name: str) -> None:
    """Remove the placement groups of a run, which would otherwise live as long as the driver."""
    if not ray.is_initialized():
        return
    for group in ray.util.placement_group_table().values():
        if group["name"].startswith(f"{name}-") and group["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))
