"""Validate the data that the user passed, and describe it for the workers.

Rows that raykeras batches become a `RowsSpec`; batches that the user makes become a `BatchesSpec`. Invalid data is
refused before anything is started.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raykeras.core.config import Run, Scale
from raykeras.core.errors import OptionError
from raykeras.core.structures import Structure, structure_of
from raykeras.data.adapters.adapter import Batches, as_batches
from raykeras.data.adapters.spec import BatchesSpec
from raykeras.data.batch_spec import BatchSpec, Role
from raykeras.data.plan import default_num_shards, window_rows_for
from raykeras.data.resolve import check_weights, resolve, with_class_weight
from raykeras.data.sources.arrays import ArraySource, from_arrays
from raykeras.data.sources.base import OpenSource, Source
from raykeras.data.sources.ray_dataset import is_ray_dataset
from raykeras.data.streaming.cache import CachedRows, should_cache
from raykeras.data.streaming.spec import RowsSpec
from raykeras.data.train_input import DataSpec

_WHOLE_SHARD = 1 << 62  # unlimited window: shuffling rows in memory needs no buffer


@dataclass(frozen=True)
class Rows:
    """Rows of an opened source.

    Attributes:
        source: The source.
        opened: Its metadata, possibly of a slice of its rows.
        structures: How the tensors of each role are nested.
    """

    source: Source
    opened: OpenSource
    structures: Mapping[Role, Structure]

    def split(self, fraction: float) -> tuple[Rows, Rows]:
        """Return the rows without the last fraction, and the last fraction."""
        train, validation = split_rows(self.opened, fraction)
        return replace(self, opened=train), replace(self, opened=validation)


OpenData = Rows | Batches
"""Data as the user passed it, opened."""


def open_data(x: Any, y: Any, sample_weight: Any, floatx: str) -> OpenData:
    """Open what the user passed as x, y and sample_weight.

    Raises:
        OptionError: If the arguments do not fit together.
        SourceError: If a file cannot be read.
        ColumnError: If the arrays or columns cannot be used.
    """
    batches = as_batches(x, floatx)
    if batches is None:
        source, structures = as_source(x, y, sample_weight)
        return Rows(source, source.open(), structures)
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise OptionError(
                f"With a {batches.type_name}, `{name}` is part of the batches, (x, y) or (x, y, sample_weight); got "
                f"`{name}` as well. Leave it out."
            )
    return batches


def open_validation(data: Any, floatx: str) -> OpenData:
    """Open what the user passed as `validation_data`; raises as `open_data`."""
    batches = as_batches(data, floatx)
    if batches is not None:
        return batches
    source, structures = as_validation(data)
    return Rows(source, source.open(), structures)


def steps_within(data: OpenData, steps_per_epoch: int | None, batch_size: int | None) -> int | None:
    """Return `steps_per_epoch`, or None if a pass over the user's batches is shorter.

    Warns if some epochs have fewer steps: Keras 3 ends an epoch when arrays or batches end. For arrays,
    `TrainJob.ends_with_pass` does so.
    """
    if isinstance(data, Batches):
        num_batches, is_short = (
            data.num_batches,
            bool(data.num_batches and data.num_batches < (steps_per_epoch or 0)),
        )
    elif isinstance(data.source, ArraySource):
        num_batches = -(-data.opened.num_rows // (batch_size or 32))
        is_short = bool(steps_per_epoch and num_batches % steps_per_epoch)
    else:
        return steps_per_epoch
    if is_short:
        warnings.warn(
            f"In Keras 3 an epoch ends when the data ends; got `steps_per_epoch={steps_per_epoch}` and data of "
            f"{num_batches} batches, so some epochs have fewer steps. Repeat the data, or change `steps_per_epoch`.",
            stacklevel=4,  # the caller of `fit`
        )
    return None if is_short and isinstance(data, Batches) else steps_per_epoch


def train_spec(
    data: OpenData,
    *,
    batch_size: int | None,
    shuffle: bool | int,
    class_weight: Mapping[Any, Any] | None,
    steps_per_epoch: int | None,
    scale: Scale,
    seed: int,
    floatx: str,
) -> DataSpec:
    """Describe how the training data is used.

    Args:
        data: The opened data.
        batch_size: Rows of a global batch, 32 if None; ignored for batches, as in Keras.
        shuffle: Whether to shuffle; an integer is the shuffle window in rows, at least 1.
        class_weight: Class to weight, or that by output name.
        steps_per_epoch: Steps of an epoch; None for a pass over the data.
        scale: The workers.
        seed: Seed of the row order.
        floatx: dtype of floats.

    Raises:
        OptionError: If the options do not fit the data.
        ColumnError: If a column cannot be used.
        UserCodeError: If the source's transform fails on the first rows.
    """
    if isinstance(data, Batches):
        _require_end(data, steps_per_epoch, "steps_per_epoch", scale)
        batch_spec = with_class_weight(data.batch_spec, class_weight, floatx)
        return BatchesSpec(data, batch_spec, data.num_batches, bool(shuffle), seed, steps_per_epoch)
    batch_size = check_batch_size("batch_size", batch_size or 32, scale)
    batch_spec = resolve(data.source, data.opened, class_weight=class_weight, floatx=floatx, structures=data.structures)
    check_weights(data.opened, batch_spec)
    by_index = data.opened.reader.in_memory and batch_spec.transform is None
    window_rows = _WHOLE_SHARD if by_index else window_rows_for(batch_spec.row_nbytes)
    if not isinstance(shuffle, bool):
        window_rows = check_positive("shuffle", shuffle)
    order, num_shards = "shuffled" if shuffle else "source", default_num_shards(scale.workers)
    cache = _cached(data.source, data.opened, batch_spec)
    is_arrays = isinstance(data.source, ArraySource)
    return RowsSpec(data.opened, batch_spec, order, batch_size, num_shards, window_rows, seed, cache, is_arrays)  # type: ignore[arg-type]


def validation_spec(
    data: OpenData,
    *,
    batch_size: int,
    steps: int | None,
    scale: Scale,
    seed: int,
    floatx: str,
    steps_name: str = "validation_steps",
) -> DataSpec:
    """Describe how validation data is used.

    Every validation uses the same rows in the same order; a generator continues where it stopped.

    Args:
        data: The opened data.
        batch_size: Rows of a global batch; ignored for batches.
        steps: Batches to use; None for all.
        scale: The workers.
        seed: Seed of random transforms.
        floatx: dtype of floats.
        steps_name: The name of the argument `steps`, for messages.

    Raises:
        OptionError: If the options do not fit the data.
        ColumnError: If a column cannot be used.
        UserCodeError: If the source's transform fails on the first rows.
    """
    if isinstance(data, Batches):
        _require_end(data, steps, steps_name, scale)
        if data.kind == "generator" and steps is None and steps_name == "validation_steps":
            raise OptionError(
                "A generator can be iterated only once, but validation runs repeatedly; got one as `validation_data` "
                "without `validation_steps`. Pass `validation_steps`, or data that can be iterated repeatedly."
            )
        steps = data.num_batches if steps is None else min(steps, data.num_batches or steps)
        return BatchesSpec(data, data.batch_spec, steps, False, seed, steps, restart=True)
    check_batch_size("validation_batch_size", batch_size, scale)
    opened = data.opened
    if steps is not None:
        opened = opened.slice(0, min(opened.num_rows, steps * batch_size))
    batch_spec = resolve(data.source, opened, floatx=floatx, structures=data.structures)
    check_weights(opened, batch_spec)
    num_shards = default_num_shards(scale.workers)
    window_rows, cache = window_rows_for(batch_spec.row_nbytes), _cached(data.source, opened, batch_spec)
    return RowsSpec(opened, batch_spec, "sharded", batch_size, num_shards, window_rows, seed, cache)


def _cached(source: Source, opened: OpenSource, batch_spec: BatchSpec) -> CachedRows | None:
    return CachedRows(opened, batch_spec) if should_cache(source, opened, batch_spec) else None


def _require_end(batches: Batches, steps: int | None, name: str, scale: Scale) -> None:
    """Check that the workers can know where an epoch ends, and that a Sequence can be sent to tasks."""
    if batches.is_infinite and steps is None:
        raise OptionError(
            f"With infinite data, the number of batches must be specified; got an infinite {batches.type_name} "
            f"without `{name}`. Pass `{name}`."
        )
    if batches.num_batches is None and steps is None and scale.workers > 1:
        raise OptionError(
            f"With several workers, the number of batches must be known; got a {batches.type_name} of unknown length "
            f"without `{name}`. Pass `{name}`, or use one worker."
        )
    if batches.kind == "sequence" and scale.workers > 1:
        check_picklable(batches.data)


def check_picklable(sequence: Any) -> None:
    """Raise OptionError if a Sequence cannot be sent to the tasks that make its batches."""
    from ray import cloudpickle

    def failure(value: Any) -> Exception | None:
        try:
            cloudpickle.dumps(value, protocol=5, buffer_callback=lambda buffer: None)  # arrays are not copied
        except Exception as error:
            return error
        return None

    error = failure(sequence)
    if error is None:
        return
    names = [name for name, value in getattr(sequence, "__dict__", {}).items() if failure(value) is not None]
    what = " and ".join(f"`{name}` ({type(vars(sequence)[name]).__name__})" for name in names) or "the state"
    raise OptionError(
        f"With several workers, a Sequence must be picklable, since Ray tasks make its batches; {what} of "
        f"{type(sequence).__name__} cannot be pickled: {error}. Create such attributes in `__getitem__` on first use, "
        "leave them out in `__getstate__`, or use one worker."
    )


def as_source(x: Any, y: Any, sample_weight: Any) -> tuple[Source, Mapping[Role, Structure]]:
    """Return x, y and sample_weight as a source, and how the tensors of each role are nested."""
    if isinstance(x, Source):
        for name, value in (("y", y), ("sample_weight", sample_weight)):
            if value is not None:
                raise OptionError(
                    f"With a source, `{name}` must name columns of the source; got `{name}` as an argument of the "
                    f"call. Pass it to the source: `rk.parquet(..., {name}=...)`."
                )
        return x, {}
    _refuse_raw_dataset("x", x)
    if isinstance(x, str | os.PathLike):
        raise OptionError(
            f"x must be data; got the path {os.fspath(x)!r}. To read Parquet files, pass "
            f"`rk.parquet({os.fspath(x)!r}, x=..., y=...)`; for NumPy files, `rk.npy`."
        )
    roles: tuple[tuple[Role, Any], ...] = (("x", x), ("y", y), ("sample_weight", sample_weight))
    return from_arrays(x, y, sample_weight), {role: structure_of(value) for role, value in roles}


def as_validation(data: Any) -> tuple[Source, Mapping[Role, Structure]]:
    """Return `validation_data` as a source, and how the tensors of each role are nested."""
    if isinstance(data, Source):
        return data, {}
    _refuse_raw_dataset("validation_data", data)
    values = tuple(data) if isinstance(data, list | tuple) else (data,)
    if len(values) not in (1, 2, 3):
        raise OptionError(
            "`validation_data` must be a source, batches, x, (x, y) or (x, y, sample_weight); got a "
            f"{type(data).__name__} of length {len(values)}."
        )
    x, y, sample_weight = (*values, None, None)[:3]
    return as_source(x, y, sample_weight)


def _refuse_raw_dataset(name: str, value: Any) -> None:
    if is_ray_dataset(value):
        raise OptionError(
            f"A Ray dataset must name its x and y columns; got a {type(value).__name__} as `{name}`. "
            "Wrap it: `rk.dataset(ds, x=..., y=...)`."
        )


def split_rows(opened: OpenSource, fraction: float) -> tuple[OpenSource, OpenSource]:
    """Split off the last fraction of the rows, rounded as Keras rounds `validation_split`.

    Returns:
        The rows to train on, and those to validate with.

    Raises:
        OptionError: If either would be empty.
    """
    if not 0 < fraction < 1:
        raise OptionError(f"`validation_split` must be above 0 and below 1; got {fraction!r}.")
    num_train = int(np.floor(opened.num_rows * (1 - fraction)))
    if num_train == 0 or num_train == opened.num_rows:
        raise OptionError(
            f"`validation_split={fraction}` must leave rows for both training and validation; of {opened.num_rows} "
            f"rows it leaves {num_train} for training. Pass `validation_data`."
        )
    return opened.slice(0, num_train), opened.slice(num_train, opened.num_rows)


def check_scale_and_run(scale: Any, run: Any = None) -> None:
    """Raise OptionError unless `scale` and `run` are a `Scale` and a `Run`, or None."""
    if scale is not None and not isinstance(scale, Scale):
        example = f"workers={scale}" if isinstance(scale, int) else "workers=2"
        raise OptionError(f"`scale` must be a raykeras.Scale; got {scale!r}. Write `scale=rk.Scale({example})`.")
    if run is not None and not isinstance(run, Run):
        example = f"name={run!r}" if isinstance(run, str) else 'name="first"'
        raise OptionError(f"`run` must be a raykeras.Run; got {run!r}. Write `run=rk.Run({example})`.")


def check_batch_size(name: str, value: Any, scale: Scale) -> int:
    """Return a batch size as an int; warn if it is less than the number of replicas.

    Raises:
        OptionError: If it is not an integer of at least 1.
    """
    size = check_positive(name, value)
    if size < scale.total_replicas:
        warnings.warn(
            f"`{name}` is the global batch size and should be at least the number of replicas; got {size} and "
            f"{scale.total_replicas} replicas, so some receive no rows. Try `{name}={scale.total_replicas}`, or fewer "
            "workers.",
            stacklevel=5,  # the caller of `fit`
        )
    return size


def check_positive(name: str, value: Any) -> int:
    """Return a value as an int; raise OptionError unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise OptionError(f"`{name}` must be a whole number of at least 1; got {value!r}.")
    return int(value)
