"""`raykeras.evaluate`: run Keras' `evaluate` on the workers, each on its shards of the data."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

from raykeras.checkpoint.model_io import as_model, is_model, pack_model
from raykeras.compat.keras_api import current_floatx
from raykeras.compat.quiet import import_tensorflow, quiet
from raykeras.compat.versions import check_installed
from raykeras.core.config import Scale
from raykeras.core.errors import OptionError, printable
from raykeras.core.logs import Logs
from raykeras.core.tracebacks import without_frames
from raykeras.data.inputs import (
    Rows,
    check_batch_size,
    check_positive,
    check_scale_and_run,
    open_data,
    validation_spec,
)
from raykeras.data.streaming.resources import CpuBudget
from raykeras.driver.callback import only_keras_callbacks
from raykeras.driver.cluster import connect
from raykeras.driver.progress import check_verbose
from raykeras.driver.screen import metric_texts
from raykeras.driver.shared_paths import check_sources
from raykeras.driver.worker_group import check_strategy_scope, run_here, runs_here
from raykeras.driver.worker_pool import run_on_workers
from raykeras.worker.callback_placement import pack, restore_callbacks, unwrapped
from raykeras.worker.entry import evaluate_on_worker
from raykeras.worker.job import EvaluationJob


@without_frames
def evaluate(
    model: Any,
    x: Any,
    y: Any = None,
    *,
    batch_size: int | None = None,
    sample_weight: Any = None,
    verbose: str | int = "auto",
    steps: int | None = None,
    callbacks: Sequence[Any] | Any | None = None,
    scale: Scale | None = None,
    seed: int = 0,
    safe_mode: bool = True,
    return_dict: bool = True,
) -> Any:
    """Return the loss and the metrics of a model, on one machine or on a Ray cluster.

    The values are those of `keras.Model.evaluate` over the same data: every row counts once, on any number of workers.

    Args:
        model: Model to evaluate. It can be:

            - A compiled model, or a function without arguments that builds and compiles one.
            - A `raykeras.Checkpoint`, or the path of a checkpoint or of a `.keras` file.
        x: Input data, in any form that `fit` accepts.
        y: Target data, as in `fit`.
        batch_size: Integer or `None`. Number of rows per batch, over all replicas of all workers. Defaults to 32.
            Ignored if `x` yields batches.
        sample_weight: Optional weights of the rows, as in `fit`.
        verbose: `"auto"`, 0, 1 or 2. 0 is silent; otherwise one line with the metrics is printed at the end.
        steps: Integer or `None`. Number of batches to evaluate, from the first one. `None` evaluates all of them.
        callbacks: List of `keras.callbacks.Callback` instances, or a single one. With several workers they run on each
            worker, and your objects then have the attributes of the chief's (rank 0).
        scale: `raykeras.Scale` with a fixed number of workers. Defaults to one worker in this process.
        seed: Integer. Seeds random layers.
        safe_mode: Boolean. Whether to refuse a `.keras` file that contains code, as in `fit`.
        return_dict: Boolean. If `True`, the loss and the metrics are returned as a dict from name to value. If `False`,
            they are returned as a list, as in Keras.

    Returns:
        A dict or a list of values, or the loss alone if `return_dict` is `False` and there is no other value. A value
        is a float, or an array for a metric that has several values.

    Raises:
        ValidationError: If an argument, the data or the model is invalid. The message says what to change.
        ResourceError: If the cluster can never provide the requested resources.
        UserCodeError: If the user's code raises an exception on a worker.
        WorkerLostError: If a worker is lost.
        CheckpointError: If the checkpoint does not exist or cannot be read.
    """
    started = time.perf_counter()
    check_installed()
    check_verbose(verbose)
    check_scale_and_run(scale)
    scale = with_fixed_workers(scale or Scale())
    batch_size = check_batch_size("batch_size", 32 if batch_size is None else batch_size, scale)
    if steps is not None:
        check_positive("steps", steps)
    model = as_model(model, safe_mode=safe_mode)
    quiet()
    floatx = current_floatx()
    data = open_data(x, y, sample_weight, floatx)
    common: dict[str, Any] = {"scale": scale, "seed": seed, "floatx": floatx}
    spec = validation_spec(data, batch_size=batch_size, steps=steps, steps_name="steps", **common)
    in_process = runs_here(scale)
    if in_process:
        check_strategy_scope("evaluate")
    spec.read_ahead()
    is_local = in_process and not spec.uses_ray_data
    budget = CpuBudget() if is_local else connect(scale, in_process=in_process)
    if not is_local and isinstance(data, Rows):
        check_sources([data.opened])
    job = EvaluationJob(spec, scale, seed, budget)
    keras_callbacks = only_keras_callbacks(callbacks, "evaluate")
    if in_process:
        logs, values = _evaluate_here(job, model, keras_callbacks)
    else:
        import ray
        from ray import cloudpickle

        packed = (*pack_model(model), pack(keras_callbacks, cloudpickle.dumps))
        with spec.for_workers(scale.workers, budget.cpus_per_task) as shared:
            task = ray.put((dataclasses.replace(job, data=shared), *packed, "tensorflow" in sys.modules))
            config, cpus = {"task": task}, budget.cpus_per_worker
            logs, values, states = run_on_workers(
                evaluate_on_worker, config, scale=scale, cpus_per_worker=cpus, api=packed[0]
            )
        restore_callbacks(keras_callbacks, states, cloudpickle.loads)
    if verbose != 0:
        _print_line(logs, spec.num_steps, time.perf_counter() - started)
    if return_dict:
        return logs
    return values if len(values) > 1 else values[0]


def _evaluate_here(job: EvaluationJob, model: Any, callbacks: list[Any]) -> tuple[Logs, list[Any]]:
    """Evaluate in this process; return the metrics by name, and their values in Keras' order."""
    import_tensorflow()
    from ray import cloudpickle

    from raykeras.worker import train

    api, build = pack_model(model, lazily=True)

    def build_model() -> Any:
        return model if is_model(model) else cloudpickle.loads(build)()

    def work() -> tuple[Logs, list[Any]]:
        return train.evaluate(job, rank=0, api=api, build=build_model, callbacks=unwrapped(callbacks))

    logs, values = run_here(work)
    return logs, values


def _print_line(logs: Logs, num_steps: int | None, seconds: float) -> None:
    """Print, for example, `8/8 - 0.4s - loss: 0.4321 - accuracy: 0.8123`, as Keras does."""
    steps = [] if num_steps is None else [f"{num_steps}/{num_steps}"]
    print(printable(" - ".join([*steps, f"{seconds:.1f}s", *metric_texts(logs)])), flush=True)


def with_fixed_workers(scale: Scale) -> Scale:
    """Return the scale if its number of workers is fixed.

    Raises:
        OptionError: If `workers` is a pair.
    """
    if scale.min_workers is not None:
        raise OptionError(
            "`workers` must be one number here, since only `fit` accepts a pair; got "
            f"({scale.min_workers}, {scale.workers}). Pass `workers={scale.workers}`."
        )
    return scale
