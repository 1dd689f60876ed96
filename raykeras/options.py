"""`Scale` and `Run`: how wide a run is, and where and how it is kept.

Frozen value objects, validated when made, without Ray or TensorFlow.

    rk.fit(build, source, scale=rk.Scale(workers=8, gpus_per_worker=4), run=rk.Run(storage="s3://bucket/runs"))
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from raykeras.errors import OptionError

_SECONDS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How many processes and devices train.

    Attributes:
        workers: Number of worker processes, at least 1. One worker runs in the calling process. A pair,
            such as (1, 8): at least so many and at most so many, as the cluster has room; `fit` only.
        gpus_per_worker: GPUs of each worker, at least 0. Every GPU holds one replica.
        replicas_per_worker: Replicas on each worker, at least 1. Without GPUs these are logical
            CPU devices; with GPUs it may be left at 1, and is then `gpus_per_worker`.
        cpus_per_worker: Logical CPUs that each worker process holds in Ray, above 0. By default 1,
            or less where the data tasks would otherwise be left without any.
        least_workers: The least of a pair, of which `workers` is then the most.
    """

    workers: Any = 1
    gpus_per_worker: int = 0
    replicas_per_worker: int = 1
    cpus_per_worker: float | None = None
    least_workers: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.workers, tuple | list):
            if len(self.workers) != 2:
                raise OptionError(f"`workers` must be a number, or a pair (least, most); got {self.workers!r}.")
            least, most = self.workers
            object.__setattr__(self, "workers", most)
            object.__setattr__(self, "least_workers", least)
        _require_int("workers", self.workers, 1)
        if self.least_workers is not None:
            _require_int("least_workers", self.least_workers, 1)
            _require_int("workers", self.workers, self.least_workers)
        _require_int("gpus_per_worker", self.gpus_per_worker, 0)
        _require_int("replicas_per_worker", self.replicas_per_worker, 1)
        if self.cpus_per_worker is not None and not self.cpus_per_worker > 0:
            raise OptionError(
                f"`cpus_per_worker` must be above 0; got {self.cpus_per_worker!r}. Leave it out for the default."
            )
        if self.gpus_per_worker and self.replicas_per_worker not in (1, self.gpus_per_worker):
            raise OptionError(
                "`replicas_per_worker` must be 1 or `gpus_per_worker`, since every GPU holds one replica; got "
                f"{self.replicas_per_worker} and {self.gpus_per_worker}. Leave `replicas_per_worker` out."
            )

    def of(self, workers: int) -> Scale:
        """The same with so many workers, neither less nor more."""
        return replace(self, workers=workers, least_workers=None)

    @property
    def least(self) -> int:
        """Workers that there must be."""
        return int(self.workers if self.least_workers is None else self.least_workers)

    @property
    def replicas(self) -> int:
        """Replicas on each worker, GPUs taken into account."""
        return max(self.replicas_per_worker, self.gpus_per_worker)

    @property
    def num_replicas(self) -> int:
        """Replicas over all workers."""
        return int(self.workers * self.replicas)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run is kept, and what happens to it when something fails.

    Attributes:
        storage: Folder or fsspec URL under which the run's folder is made.
        name: The run's folder. By default made from the pipeline's name and the time.
        seed: Seeds the order of rows, the weights and every random layer; 0 to 2**32 - 1.
        resume: What happens where the run's folder holds checkpoints. "auto" goes on from the newest
            whole one, at the very step; "weights" begins anew with its weights; None refuses.
        checkpoint_every: "epoch"; or so many steps, or a `datetime.timedelta` or text such as "90s" or
            "10min", and then at the end of each epoch, too; or None for no checkpoint but the last.
        keep: Newest checkpoints to keep, at least 1; the best one by `monitor` is kept besides.
        monitor: Metric by which a checkpoint is best.
        max_failures: Failures of workers, without a new checkpoint between them, after which the run
            fails; at least 0.
        hang_timeout_s: Seconds without a step after which a worker is taken to hang, at least half an hour before
            its first step, for which the model is built and traced; None for never.
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
            raise OptionError(f"`seed` must be below 2**32, as Keras and NumPy want it; got {self.seed}.")
        if self.resume not in ("auto", "weights", None):
            raise OptionError(f'`resume` must be "auto", "weights" or None; got {self.resume!r}.')
        object.__setattr__(self, "checkpoint_every", _checkpoint_every(self.checkpoint_every))
        _require_int("keep", self.keep, 1)
        _require_int("max_failures", self.max_failures, 0)
        if self.hang_timeout_s is not None and not self.hang_timeout_s > 0:
            raise OptionError(f"`hang_timeout_s` must be above 0, or None for never; got {self.hang_timeout_s!r}.")


def _checkpoint_every(value: Any) -> Any:
    """The value, a text of a duration as `timedelta`."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h)", value)):
        value = timedelta(seconds=float(match[1]) * _SECONDS[match[2]])
    if isinstance(value, timedelta):
        if value.total_seconds() > 0:
            return value
    elif value in ("epoch", None) or (type(value) is int and value > 0):
        return value
    raise OptionError(
        '`checkpoint_every` must be "epoch", a number of steps above 0, a `timedelta` or a text such as "90s", "10min" '
        f'or "1h", or None; got {value!r}.'
    )


def _require_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise OptionError(f"`{name}` must be a whole number of at least {minimum}; got {value!r}.")
