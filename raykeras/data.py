"""The data that the user passed, as orders for the workers.

Enters: x, y, sample_weight and what was said of them. Leaves: `DataOrders` for rows that raykeras puts
into batches, `BatchOrders` for batches that the user makes; or an error before anything starts.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from raykeras.arguments import as_source, as_validation, check_batch_size, check_positive, split_rows
from raykeras.batches import Batches, as_batches
from raykeras.columns import Layout, Role, Tensor, class_weighted_shape
from raykeras.errors import OptionError
from raykeras.held import Held, is_held
from raykeras.options import Scale
from raykeras.orders import BatchOrders, DataOrders
from raykeras.plan import default_num_shards, window_rows_for
from raykeras.pump import Pump
from raykeras.sources import OpenSource, Source, listed
from raykeras.sources.arrays import ArrayReader, ArraySource
from raykeras.specs import check_weights, class_weight_by_output, resolve
from raykeras.structures import Structure

_WHOLE_SHARD = 1 << 62  # a window without end: rows in memory cost nothing to shuffle


@dataclass(frozen=True)
class Rows:
    """Rows of a source that was opened, and how they are nested for the model."""

    source: Source
    opened: OpenSource
    structures: Mapping[Role, Structure]

    def split(self, fraction: float) -> tuple[Rows, Rows]:
        """All but the last fraction, and that."""
        kept, held_out = split_rows(self.opened, fraction)
        return replace(self, opened=kept), replace(self, opened=held_out)


Given = Rows | Batches


def open_data(x: Any, y: Any, sample_weight: Any, floatx: str) -> Given:
    """Opens what was passed as x, y and sample_weight."""
    batches = as_batches(x, floatx)
    if batches is None:
        source, structures = as_source(x, y, sample_weight)
        return Rows(source, source.open(), structures)
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise OptionError(
                f"With a {batches.described} `{name}` is part of its batches, (x, y) or (x, y, sample_weight); got "
                f"`{name}` as well. Leave it out."
            )
    return batches


def open_validation(data: Any, floatx: str) -> Given:
    """Opens what was passed as `validation_data`."""
    batches = as_batches(data, floatx)
    if batches is not None:
        return batches
    source, structures = as_validation(data)
    return Rows(source, source.open(), structures)


def steps_within(given: Given, steps_per_epoch: int | None, batch_size: int | None) -> int | None:
    """Return `steps_per_epoch`, or None where a pass over the user's batches is shorter; warn of epochs that are.

    Keras 3 ends an epoch where arrays or batches end. `Orders.ends_with_pass` does it for arrays.
    """
    if isinstance(given, Batches):
        num_batches, is_short = (
            given.num_batches,
            bool(given.num_batches and given.num_batches < (steps_per_epoch or 0)),
        )
    elif isinstance(given.source, ArraySource):
        num_batches = -(-given.opened.num_rows // (batch_size or 32))
        is_short = bool(steps_per_epoch and num_batches % steps_per_epoch)
    else:
        return steps_per_epoch
    if is_short:
        warnings.warn(
            f"In Keras 3 an epoch ends where the data ends; got `steps_per_epoch={steps_per_epoch}` and data of "
            f"{num_batches} batches, so that some epochs have fewer steps. Repeat the data, or change "
            "`steps_per_epoch`.",
            stacklevel=4,  # the caller of `fit`
        )
    return None if is_short and isinstance(given, Batches) else steps_per_epoch


def train_orders(
    given: Given,
    *,
    batch_size: int | None,
    shuffle: bool | int,
    class_weight: Mapping[Any, Any] | None,
    steps_per_epoch: int | None,
    scale: Scale,
    seed: int,
    floatx: str,
) -> DataOrders | BatchOrders:
    """How the training data is used."""
    if isinstance(given, Batches):  # which ignore `batch_size`, as in Keras
        _require_end(given, steps_per_epoch, "steps_per_epoch", scale)
        layout = _with_class_weight(given.layout, class_weight, floatx)
        return BatchOrders(given, layout, given.num_batches, bool(shuffle), seed, steps_per_epoch)
    batch_size = check_batch_size("batch_size", batch_size or 32, scale)
    layout = resolve(given.source, given.opened, class_weight=class_weight, floatx=floatx, structures=given.structures)
    check_weights(given.opened, layout)
    by_index = given.opened.reader.in_memory and layout.transform is None
    window_rows = _WHOLE_SHARD if by_index else window_rows_for(layout.row_nbytes)
    if not isinstance(shuffle, bool):
        window_rows = check_positive("shuffle", shuffle)
    order, num_shards = "shuffled" if shuffle else "source", default_num_shards(scale.workers)
    held = _held(given.source, given.opened, layout)
    is_arrays = isinstance(given.source, ArraySource)
    return DataOrders(given.opened, layout, order, batch_size, num_shards, window_rows, seed, held, is_arrays)  # type: ignore[arg-type]


def validation_orders(
    given: Given,
    *,
    batch_size: int,
    steps: int | None,
    scale: Scale,
    seed: int,
    floatx: str,
    steps_name: str = "validation_steps",
) -> DataOrders | BatchOrders:
    """How the validation data is used: in its order, the same rows each time; of a generator the next ones."""
    if isinstance(given, Batches):
        _require_end(given, steps, steps_name, scale)
        if given.kind == "generator" and steps is None and steps_name == "validation_steps":
            raise OptionError(
                "A generator can be used up only once, and validation is made again and again; got one as "
                "`validation_data` without `validation_steps`. Give `validation_steps`, or what can be iterated anew."
            )
        steps = given.num_batches if steps is None else min(steps, given.num_batches or steps)
        return BatchOrders(given, given.layout, steps, False, seed, steps, restart=True)
    check_batch_size("validation_batch_size", batch_size, scale)
    opened = given.opened
    if steps is not None:
        opened = opened.slice(0, min(opened.num_rows, steps * batch_size))
    layout = resolve(given.source, opened, floatx=floatx, structures=given.structures)
    check_weights(opened, layout)
    num_shards = default_num_shards(scale.workers)
    window_rows, held = window_rows_for(layout.row_nbytes), _held(given.source, opened, layout)
    return DataOrders(opened, layout, "sharded", batch_size, num_shards, window_rows, seed, held)


def _held(source: Source, opened: OpenSource, layout: Layout) -> Held | None:
    return Held(opened, layout) if is_held(source, opened, layout) else None


@contextlib.contextmanager
def for_workers(orders: DataOrders | BatchOrders | None, num_workers: int, cpus_per_task: float) -> Iterator[Any]:
    """The same orders, to be pickled for workers: arrays lie in the object store, batches come through a pump."""
    if isinstance(orders, BatchOrders):
        pump = Pump(orders, num_workers, cpus_per_task)
        try:
            yield replace(orders, batches=orders.batches.without_data(), pipes=pump.pipes)
        finally:
            pump.close()
        return
    if orders is not None:
        reader = orders.held.reader if orders.held is not None else orders.opened.reader
        if isinstance(reader, ArrayReader):
            reader.share()
    yield orders


def read_ahead(every: Iterable[DataOrders | BatchOrders | None]) -> None:
    """Begins to read what will be held, while there is other work to do."""
    for each in every:
        if isinstance(each, DataOrders) and each.held is not None:
            each.held.start()


def in_memory(every: Iterable[DataOrders | BatchOrders | None]) -> bool:
    """Whether none of them needs Ray Data."""
    return all(not isinstance(each, DataOrders) or each.in_memory for each in every)


def _require_end(given: Batches, steps: int | None, name: str, scale: Scale) -> None:
    """That it is known where an epoch ends, and that the data can get where it is used."""
    if given.is_infinite and steps is None:
        raise OptionError(
            f"Data without end must say how many batches are used; got an infinite {given.described} without "
            f"`{name}`. Give `{name}`."
        )
    if given.num_batches is None and steps is None and scale.workers > 1:
        raise OptionError(
            f"Several workers must know beforehand how many batches there are; a {given.described} of unknown "
            f"length came without `{name}`. Give `{name}`, or use one worker."
        )
    if given.kind == "sequence" and scale.workers > 1:
        check_picklable(given.data)


def check_picklable(sequence: Any) -> None:
    """Raises OptionError if a Sequence cannot be sent to the tasks that make its batches."""
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
    what = " and ".join(f"`{name}` ({type(vars(sequence)[name]).__name__})" for name in names) or "it"
    raise OptionError(
        f"With several workers a Sequence's batches are made by Ray tasks, so that it must be picklable; {what} of "
        f"{type(sequence).__name__} cannot be pickled: {error}. Make such things in `__getitem__` when they are first "
        "needed, leave them out in `__getstate__`, or use one worker."
    )


def _with_class_weight(layout: Layout, class_weight: Mapping[Any, Any] | None, floatx: str) -> Layout:
    """The layout with a weight for each output, where a class weight, or a weight, is given for any; as `resolve`."""
    outputs, weights = layout.role("y"), {tensor.name: tensor for tensor in layout.role("sample_weight")}
    names = [tensor.name for tensor in outputs]
    if class_weight and layout.is_sequence("y"):  # by the number of the output
        class_weight = {str(k) if isinstance(v, Mapping) else k: v for k, v in class_weight.items()}
    by_output = class_weight_by_output(class_weight, names)
    if not by_output and (not weights or None in weights):
        return layout
    for name in weights:
        if name is not None and name not in names:
            raise OptionError(f"Weights must be given by the outputs of y; got {name!r}. Outputs: {listed(names)}.")
    made = []
    for output in outputs:
        weight = weights.get(output.name) or weights.get(None)
        if output.name in by_output and output.kind != "dense":
            raise OptionError(f"`class_weight` needs y to hold classes; {output.label} holds text.")
        shape, dtype = (weight.shape, weight.dtype) if weight else ((), floatx)
        weighting = by_output.get(output.name, ())
        if weighting:
            dtype, shape = floatx, class_weighted_shape(shape, output.shape)
        made.append(Tensor("sample_weight", output.name, (), "dense", dtype, shape, weighting))
    kept = tuple(tensor for tensor in layout.tensors if tensor.role != "sample_weight")
    return replace(layout, tensors=(*kept, *made)).weighted_as_y()
