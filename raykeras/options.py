"""`Scale` and `Run`: how wide a run is, and where and how it is kept.

Frozen value objects, validated when made, without Ray or TensorFlow.

    rk.fit(build, source, scale=rk.Scale(workers=8, gpus_per_worker=4), run=rk.Run(storage="s3://bucket/runs"))
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from raykeras.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How many processes and devices train.

    Attributes:
        workers: Number of worker processes, at least 1. One worker runs in the calling process.
        gpus_per_worker: GPUs of each worker, at least 0. Every GPU holds one replica.
        replicas_per_worker: Replicas on each worker, at least 1. Without GPUs these are logical
            CPU devices; with GPUs it may be left at 1, and is then `gpus_per_worker`.
        cpus_per_worker: Logical CPUs that each worker process holds in Ray, above 0. By default 1,
            or less where the data tasks would otherwise be left without any.
    """

    workers: int = 1
    gpus_per_worker: int = 0
    replicas_per_worker: int = 1
    cpus_per_worker: float | None = None

    def __post_init__(self) -> None:
        _require_int("workers", self.workers, 1)
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

    @property
    def replicas(self) -> int:
        """Replicas on each worker, GPUs taken into account."""
        return max(self.replicas_per_worker, self.gpus_per_worker)

    @property
    def num_replicas(self) -> int:
        """Replicas over all workers."""
        return self.workers * self.replicas


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run is kept, and what happens to it when something fails.

    Attributes:
        storage: Folder or fsspec URL under which the run's folder is made.
        name: The run's folder. By default made from the pipeline's name and the time.
        seed: Seeds the order of rows, the weights and every random layer; 0 to 2**32 - 1.
        checkpoint_every: "epoch", or None for no checkpoint but the last.
        keep: Newest checkpoints to keep, at least 1.
    """

    storage: str = "runs"
    name: str | None = None
    seed: int = 0
    checkpoint_every: str | None = "epoch"
    keep: int = 3

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
        if self.checkpoint_every not in ("epoch", None):
            raise OptionError(f'`checkpoint_every` must be "epoch" or None; got {self.checkpoint_every!r}.')
        _require_int("keep", self.keep, 1)


def _require_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise OptionError(f"`{name}` must be a whole number of at least {minimum}; got {value!r}.")
