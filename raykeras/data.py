"""The data that the user passed, as orders for the workers.

Enters: x, y, sample_weight and what was said of them. Leaves: `DataOrders` for rows that raykeras puts
into batches, `BatchOrders` for batches that the user makes; or an error before anything starts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from raykeras.arguments import as_source, as_validation, check_positive, split_rows
from raykeras.batches import Batches, as_batches
from raykeras.columns import Role
from raykeras.errors import OptionError
from raykeras.options import Scale
from raykeras.orders import BatchOrders, DataOrders
from raykeras.plan import default_num_shards, window_rows_for
from raykeras.pump import Pump
from raykeras.sources import OpenSource, Source
from raykeras.sources.arrays import ArrayReader
from raykeras.specs import check_weights, class_weight_by_output, resolve

_WHOLE_SHARD = 1 << 62  # a window without end: rows in memory cost nothing to shuffle


@dataclass(frozen=True)
class Rows:
    """Rows of a source that was opened; `sequences` are the roles that were given as lists."""

    source: Source
    opened: OpenSource
    sequences: tuple[Role, ...]

    def split(self, fraction: float) -> tuple[Rows, Rows]:
        """All but the last fraction, and that."""
        kept, held_out = split_rows(self.opened, fraction)
        return replace(self, opened=kept), replace(self, opened=held_out)


Given = Rows | Batches


def open_data(x: Any, y: Any, sample_weight: Any, floatx: str) -> Given:
    """Opens what was passed as x, y and sample_weight."""
    batches = as_batches(x, floatx)
    if batches is None:
        source, sequences = as_source(x, y, sample_weight)
        return Rows(source, source.open(), sequences)
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise OptionError(
                f"With a {_described(batches)} `{name}` is part of its batches, (x, y) or (x, y, sample_weight); got "
                f"`{name}` as well. Leave it out."
            )
    return batches


def open_validation(data: Any, floatx: str) -> Given:
    """Opens what was passed as `validation_data`."""
    batches = as_batches(data, floatx)
    if batches is not None:
        return batches
    source, sequences = as_validation(data)
    return Rows(source, source.open(), sequences)


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
    if isinstance(given, Batches):
        if batch_size is not None:
            raise OptionError(
                f"A {_described(given)} makes its batches itself; got `batch_size={batch_size}` as well. Leave it out."
            )
        _require_length(given, steps_per_epoch, "steps_per_epoch", scale)
        names = [tensor.name for tensor in given.layout.role("y")]
        by_output = class_weight_by_output(class_weight, names)
        shuffled = bool(shuffle)
        return BatchOrders(given, given.layout, given.num_batches, shuffled, seed, tuple(by_output.items()))
    layout = resolve(given.source, given.opened, class_weight=class_weight, floatx=floatx, sequences=given.sequences)
    check_weights(given.opened, layout)
    by_index = given.opened.reader.in_memory and layout.transform is None
    window_rows = _WHOLE_SHARD if by_index else window_rows_for(layout.row_nbytes)
    if not isinstance(shuffle, bool):
        window_rows = check_positive("shuffle", shuffle)
    order, num_shards = "shuffled" if shuffle else "source", default_num_shards(scale.workers)
    return DataOrders(given.opened, layout, order, batch_size or 32, num_shards, window_rows, seed)  # type: ignore[arg-type]


def validation_orders(
    given: Given, *, batch_size: int, steps: int | None, scale: Scale, seed: int, floatx: str
) -> DataOrders | BatchOrders:
    """How the validation data is used: in its order, the same rows each time."""
    if isinstance(given, Batches):
        _require_length(given, steps, "validation_steps", scale)
        if given.kind == "generator":
            raise OptionError(
                "A generator can be used up only once, and validation is made each epoch; got one as "
                "`validation_data`. Give arrays, a source, a tf.data.Dataset or a PyDataset."
            )
        num_steps = given.num_batches if steps is None else min(steps, given.num_batches or steps)
        return BatchOrders(given, given.layout, num_steps, False, seed, restart=True)
    opened = given.opened
    if steps is not None:
        opened = opened.slice(0, min(opened.num_rows, steps * batch_size))
    layout = resolve(given.source, opened, floatx=floatx, sequences=given.sequences)
    check_weights(opened, layout)
    num_shards = default_num_shards(scale.workers)
    return DataOrders(opened, layout, "sharded", batch_size, num_shards, window_rows_for(layout.row_nbytes), seed)


@contextlib.contextmanager
def for_workers(orders: DataOrders | BatchOrders | None, scale: Scale) -> Iterator[Any]:
    """The same orders, to be pickled for workers: arrays lie in the object store, batches come through a pump."""
    if isinstance(orders, BatchOrders):
        assert orders.batches is not None
        limit = orders.num_steps if orders.restart else None
        pump = Pump(orders.batches, scale.workers, limit, orders.shuffle, orders.seed)
        try:
            yield replace(orders, batches=None, pipes=pump.pipes)
        finally:
            pump.close()
        return
    if orders is not None and isinstance(orders.opened.reader, ArrayReader):
        orders.opened.reader.share()
    yield orders


def in_memory(every: Iterable[DataOrders | BatchOrders | None]) -> bool:
    """Whether none of them needs Ray Data."""
    return all(not isinstance(each, DataOrders) or each.opened.reader.in_memory for each in every)


def _require_length(given: Batches, steps: int | None, name: str, scale: Scale) -> None:
    if given.num_batches is None and steps is None and scale.num_replicas > 1:
        raise OptionError(
            f"Several replicas must know beforehand how many batches there are; a {_described(given)} of unknown "
            f"length came without `{name}`. Give `{name}`, or train on one replica."
        )


def _described(given: Batches) -> str:
    return {"dataset": "tf.data.Dataset", "sequence": "Sequence", "generator": "generator"}[given.kind]
