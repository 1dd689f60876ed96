"""The options of a run: `Scale` (workers and devices) and `Run` (storage, resuming and failures).

rk.fit(build, source, scale=rk.Scale(workers=8, gpus_per_worker=4), run=rk.Run(storage="s3://bucket/runs"))
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

from raykeras.core.errors import OptionError

_SECONDS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The number of processes and devices that train.

    Attributes:
        workers: Number of worker processes, at least 1. A single worker runs in the calling process. A pair
            `(min, max)`, such as (1, 8), uses as many workers as the cluster has room for; `fit` only.
        gpus_per_worker: GPUs per worker, at least 0. Each GPU holds one replica.
        replicas_per_worker: Replicas per worker, at least 1. Without GPUs, replicas are logical CPU devices. With
            GPUs, it may be left at 1 and then equals `gpus_per_worker`.
        cpus_per_worker: Logical CPUs that each worker process reserves in Ray, above 0. Defaults to 1, or to less
            if the data tasks would otherwise get none.
        min_workers: The minimum of a `(min, max)` pair; `workers` is then the maximum.
        resources_per_worker: Other resources that each worker process reserves in Ray, such as
            `{"memory": 16e9}` in bytes, or resources that nodes were given with `ray start --resources`.
        placement: `"pack"` or `"spread"`: place worker processes on as few nodes as possible, or on different ones.
        accelerator_type: Type of the GPUs, such as `"A100"`, as in `ray.util.accelerators`.
        label_selector: Labels that a worker's node must have, such as `{"ray.io/market-type": "spot"}`, as in Ray. Not
            for elastic runs.
        idle_timeout_s: Seconds for which several workers stay up after a call, at least 0. The next call of the same
            program with the same scale then starts in a second. They end sooner if anything in the cluster waits for
            resources. 0 ends them with the call. Elastic workers do not stay up.
        spares: Whether a training that has run for half a minute starts as many workers again, which import everything
            and stand by. If a worker is lost, the run continues on these. They take memory, about 0.5 GB each, but no
            CPU and no GPU. Elastic runs have none.

    Raises:
        OptionError: If a value is out of its range, or values contradict each other.
    """

    workers: Any = 1
    gpus_per_worker: int = 0
    replicas_per_worker: int = 1
    cpus_per_worker: float | None = None
    min_workers: int | None = None
    resources_per_worker: Mapping[str, float] | None = field(default=None, hash=False)
    placement: Literal["pack", "spread"] = "pack"
    accelerator_type: str | None = None
    label_selector: Mapping[str, str] | None = field(default=None, hash=False)
    idle_timeout_s: float = field(default=300.0, compare=False)
    spares: bool = field(default=True, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.workers, tuple | list):
            if len(self.workers) != 2:
                raise OptionError(f"`workers` must be a number, or a pair (min, max); got {self.workers!r}.")
            min_workers, max_workers = self.workers
            object.__setattr__(self, "workers", max_workers)
            object.__setattr__(self, "min_workers", min_workers)
        _require_int("workers", self.workers, 1)
        if self.min_workers is not None:
            _require_int("min_workers", self.min_workers, 1)
            _require_int("workers", self.workers, self.min_workers)
        _require_int("gpus_per_worker", self.gpus_per_worker, 0)
        _require_int("replicas_per_worker", self.replicas_per_worker, 1)
        if self.cpus_per_worker is not None and not self.cpus_per_worker > 0:
            raise OptionError(
                f"`cpus_per_worker` must be above 0; got {self.cpus_per_worker!r}. Leave it out for the default."
            )
        self._check_placement()
        if isinstance(self.idle_timeout_s, bool) or not self.idle_timeout_s >= 0:
            raise OptionError(
                f"`idle_timeout_s` must be a number of seconds of at least 0; got {self.idle_timeout_s!r}. 0 ends the "
                "workers with the call."
            )
        if self.gpus_per_worker and self.replicas_per_worker not in (1, self.gpus_per_worker):
            raise OptionError(
                "`replicas_per_worker` must be 1 or `gpus_per_worker`, since every GPU holds one replica; got "
                f"{self.replicas_per_worker} and {self.gpus_per_worker}. Leave `replicas_per_worker` out."
            )

    def _check_placement(self) -> None:
        if self.placement not in ("pack", "spread"):
            raise OptionError(f'`placement` must be "pack" or "spread"; got {self.placement!r}.')
        for name, amount in (self.resources_per_worker or {}).items():
            if name in ("CPU", "GPU"):
                raise OptionError(
                    f"`resources_per_worker` is for other resources than CPU and GPU; got {name!r}. Pass "
                    f"`{name.lower()}s_per_worker`."
                )
            if not amount > 0:
                raise OptionError(f"`resources_per_worker` must be above 0; got {amount!r} for {name!r}.")
        if self.accelerator_type is not None and not self.gpus_per_worker:
            raise OptionError(
                f"`accelerator_type` is the type of a worker's GPUs; got {self.accelerator_type!r} without GPUs. Pass "
                "`gpus_per_worker`."
            )
        if self.label_selector is not None and self.is_elastic:
            raise OptionError(
                f"`label_selector` needs a fixed number of workers; got {dict(self.label_selector)} and "
                f"{self.worker_range} workers. Pass one number as `workers`."
            )
        in_process = self.workers == 1 and not self.gpus_per_worker
        if in_process and (self.resources_per_worker or self.label_selector or self.placement != "pack"):
            raise OptionError(
                "`resources_per_worker`, `placement` and `label_selector` are for worker processes; one worker "
                "without GPUs runs in this process. Leave them out, or pass more `workers`."
            )

    def bundle(self, cpus_per_worker: float) -> dict[str, float]:
        """Return the resources that each worker process reserves in Ray.

        Args:
            cpus_per_worker: Its logical CPUs.
        """
        bundle = {"CPU": cpus_per_worker, "GPU": float(self.gpus_per_worker), **(self.resources_per_worker or {})}
        if self.accelerator_type is not None:
            bundle[f"accelerator_type:{self.accelerator_type}"] = 0.001  # of 1 on each node, as Ray requests it
        return {name: amount for name, amount in bundle.items() if amount}

    def with_workers(self, workers: int) -> Scale:
        """Return a copy with a fixed number of workers.

        Args:
            workers: The number of workers.
        """
        return replace(self, workers=workers, min_workers=None)

    @property
    def worker_range(self) -> tuple[int, int]:
        """The minimum and the maximum number of workers."""
        return int(self.workers if self.min_workers is None else self.min_workers), int(self.workers)

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change."""
        min_workers, max_workers = self.worker_range
        return min_workers < max_workers

    @property
    def local_replicas(self) -> int:
        """The number of replicas on each worker."""
        return max(self.replicas_per_worker, self.gpus_per_worker)

    @property
    def total_replicas(self) -> int:
        """The number of replicas over all workers."""
        return int(self.workers * self.local_replicas)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run is stored, how it resumes, and which failures it tolerates.

    Attributes:
        storage: Folder or fsspec URL under which the run's folder is created.
        name: Name of the run's folder. Defaults to the pipeline's name and the time.
        seed: Seed of the row order, the initial weights and every random layer; 0 to 2**32 - 1.
        resume: What to do if the run's folder holds checkpoints. "auto" continues from the newest complete one, at
            the same step; "weights" starts over with its weights; None raises an error.
        checkpoint_every: When to save a checkpoint: "epoch"; a number of steps; an interval, as a
            `datetime.timedelta` or text such as "90s" or "10min"; or "continuous", which saves the next one once the
            previous one is written, and not more often than each second. The end of each epoch is saved as well,
            whatever the interval. None saves only the end of training.
        keep: Number of newest checkpoints to keep, at least 1. The best one by `monitor` is kept as well.
        monitor: Name of the metric that determines the best checkpoint.
        max_failures: Number of worker failures to tolerate without a new checkpoint in between, at least 0.
        hang_timeout_s: Seconds without a step after which a worker counts as hung. The first step gets at least half
            an hour, since it includes building and tracing the model. None disables the check.

    Raises:
        OptionError: If a value is out of its range.
    """

    storage: str = "runs"
    name: str | None = None
    seed: int = 0
    resume: str | None = "auto"
    checkpoint_every: str | int | timedelta | None = "epoch"
    keep: int = 3
    monitor: str = "val_loss"
    max_failures: int = 3
    hang_timeout_s: float | None = 1800.0

    def __post_init__(self) -> None:
        if not isinstance(self.storage, str | os.PathLike) or not str(self.storage):
            raise OptionError(f"`storage` must be a folder or an fsspec URL; got {self.storage!r}.")
        object.__setattr__(self, "storage", str(self.storage))
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(self.name)):
            raise OptionError(
                f"`name` must be one folder name of letters, digits, '.', '_' and '-'; got {self.name!r}."
            )
        _require_int("seed", self.seed, 0)
        if self.seed >= 2**32:
            raise OptionError(f"`seed` must be below 2**32, as Keras and NumPy require; got {self.seed}.")
        if self.resume not in ("auto", "weights", None):
            raise OptionError(f'`resume` must be "auto", "weights" or None; got {self.resume!r}.')
        object.__setattr__(self, "checkpoint_every", _checkpoint_every(self.checkpoint_every))
        _require_int("keep", self.keep, 1)
        _require_int("max_failures", self.max_failures, 0)
        if self.hang_timeout_s is not None and not self.hang_timeout_s > 0:
            raise OptionError(
                f"`hang_timeout_s` must be above 0, or None to disable the check; got {self.hang_timeout_s!r}."
            )


def _checkpoint_every(value: Any) -> Any:
    """Return a valid `checkpoint_every`, with text such as "90s" as `timedelta`."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h)", value)):
        value = timedelta(seconds=float(match[1]) * _SECONDS[match[2]])
    if isinstance(value, timedelta):
        if value.total_seconds() > 0:
            return value
    elif value in ("epoch", "continuous", None) or (type(value) is int and value > 0):
        return value
    raise OptionError(
        '`checkpoint_every` must be "epoch", "continuous", a number of steps above 0, a `timedelta` above 0, text such '
        f'as "90s", "10min" or "1h", or None; got {value!r}.'
    )


def _require_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise OptionError(f"`{name}` must be a whole number of at least {minimum}; got {value!r}.")
