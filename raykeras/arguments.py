"""What the user passed to `fit`, checked, as sources and numbers.

Enters: arrays, sources, tuples, counts. Leaves: sources, or an `OptionError`. No Ray, no TensorFlow.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from raykeras.callbacks import DriverCallback
from raykeras.columns import Role
from raykeras.errors import OptionError
from raykeras.options import Run, Scale
from raykeras.placement import unwrapped
from raykeras.sources import OpenSource, Source
from raykeras.sources.arrays import from_arrays
from raykeras.sources.dataset import is_ray_dataset
from raykeras.structures import Structure, structure_of


def split_callbacks(callbacks: Any) -> tuple[list[DriverCallback], list[Any]]:
    if callbacks is None:
        return [], []
    every = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    for callback, inner in zip(every, unwrapped(every), strict=True):
        if isinstance(inner, type) or not hasattr(inner, "on_epoch_end"):
            raise OptionError(f"`callbacks` must be callback objects; got {callback!r}.")
    return (
        [c for c in every if isinstance(c, DriverCallback)],
        [c for c in every if not isinstance(c, DriverCallback)],
    )


def as_source(x: Any, y: Any, sample_weight: Any) -> tuple[Source, Mapping[Role, Structure]]:
    """What the user passed as x, y and sample_weight, as a source; and how it is nested."""
    if isinstance(x, Source):
        for name, value in (("y", y), ("sample_weight", sample_weight)):
            if value is not None:
                raise OptionError(f"`{name}` is part of the source; give it there: `rk.parquet(..., {name}=...)`.")
        return x, {}
    _refuse_raw_dataset("x", x)
    if isinstance(x, str | os.PathLike):
        raise OptionError(
            f"x must be data; got the path {os.fspath(x)!r}. To read Parquet files, pass "
            f"`rk.parquet({os.fspath(x)!r}, x=..., y=...)`; for NumPy files, `rk.npy`."
        )
    given: tuple[tuple[Role, Any], ...] = (("x", x), ("y", y), ("sample_weight", sample_weight))
    return from_arrays(x, y, sample_weight), {role: structure_of(value) for role, value in given}


def as_validation(data: Any) -> tuple[Source, Mapping[Role, Structure]]:
    if isinstance(data, Source):
        return data, {}
    _refuse_raw_dataset("validation_data", data)
    parts = tuple(data) if isinstance(data, list | tuple) else (data,)
    if len(parts) not in (1, 2, 3):
        raise OptionError(
            "`validation_data` must be a source, batches, x, (x, y) or (x, y, sample_weight); got a "
            f"{type(data).__name__} of {len(parts)}."
        )
    x, y, sample_weight = (*parts, None, None)[:3]
    return as_source(x, y, sample_weight)


def _refuse_raw_dataset(name: str, value: Any) -> None:
    if is_ray_dataset(value):
        raise OptionError(
            f"A Ray dataset must say which of its columns are x and y; got a {type(value).__name__} as `{name}`. "
            "Wrap it: `rk.dataset(ds, x=..., y=...)`."
        )


def split_rows(opened: OpenSource, fraction: float) -> tuple[OpenSource, OpenSource]:
    """As `keras.src.trainers.data_adapters.array_slicing.train_validation_split`: the last rows."""
    if not 0 < fraction < 1:
        raise OptionError(f"`validation_split` must be above 0 and below 1; got {fraction!r}.")
    at = int(np.floor(opened.num_rows * (1 - fraction)))
    if at == 0 or at == opened.num_rows:
        raise OptionError(
            f"`validation_split={fraction}` must leave rows on both sides; of {opened.num_rows} it leaves {at} to "
            "train on. Give `validation_data`."
        )
    return opened.slice(0, at), opened.slice(at, opened.num_rows)


def check_scale_and_run(scale: Any, run: Any = None) -> None:
    """Check the types of what is no number."""
    if scale is not None and not isinstance(scale, Scale):
        example = f"workers={scale}" if isinstance(scale, int) else "workers=2"
        raise OptionError(f"`scale` must be a raykeras.Scale; got {scale!r}. Write `scale=rk.Scale({example})`.")
    if run is not None and not isinstance(run, Run):
        example = f"name={run!r}" if isinstance(run, str) else 'name="first"'
        raise OptionError(f"`run` must be a raykeras.Run; got {run!r}. Write `run=rk.Run({example})`.")


def check_batch_size(name: str, value: Any, scale: Scale) -> int:
    size = check_positive(name, value)
    if size < scale.num_replicas:
        warnings.warn(
            f"`{name}` is the rows of a step on all replicas; of {size} and {scale.num_replicas} replicas some have "
            f"nothing to do. Try `{name}={scale.num_replicas}`, or fewer workers.",
            stacklevel=5,  # the caller of `fit`
        )
    return size


def check_positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise OptionError(f"`{name}` must be a whole number of at least 1; got {value!r}.")
    return int(value)


def check_counts(*, epochs: Any, initial_epoch: Any, steps: Any, val_steps: Any) -> None:
    for name, value in (("epochs", epochs), ("initial_epoch", initial_epoch)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
            raise OptionError(f"`{name}` must be a whole number of at least 0; got {value!r}.")
    for name, value in (("steps_per_epoch", steps), ("validation_steps", val_steps)):
        if value is not None:
            check_positive(name, value)
