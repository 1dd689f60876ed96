"""A model that turns tables of rows into tables of predictions.

Enters: pieces of a source in source order. Leaves: for each an Arrow table with the model's outputs and
the columns that are carried along. The reading may run anywhere, the model where a `Predictor` is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raykeras.blocks import TASK_NBYTES
from raykeras.columns import Layout
from raykeras.noise import import_tensorflow, quiet
from raykeras.sources import OpenSource, Reader, UnitRef

OUTPUT = "prediction"
"""The column of a single output."""

Kind = Literal["one", "list", "dict", "carried"]
"""How `Model.predict` returns a column's output; or that it is none of its."""


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a unit; `index` counts the pieces of a source."""

    index: int
    unit: UnitRef
    start: int
    stop: int


def pieces_of(opened: OpenSource, layout: Layout) -> Iterator[Piece]:
    """All rows in source order, in pieces of about `TASK_NBYTES`."""
    rows = max(1, TASK_NBYTES // layout.row_nbytes)
    index = 0
    for unit in range(len(opened.unit_rows)):
        for start in range(0, int(opened.unit_rows[unit]), rows):
            yield Piece(index, opened.unit(unit), start, min(start + rows, int(opened.unit_rows[unit])))
            index += 1


def read_piece(reader: Reader, layout: Layout, carried: Sequence[str], piece: Piece) -> pa.Table:
    """The tensors of a piece, packed, and the carried columns as they are stored."""
    names = [*layout.columns, *(name for name in carried if name not in layout.columns)]
    columns = reader.read(piece.unit, piece.start, piece.stop, names)
    where = str(piece.unit)
    decoded = layout.decode({name: columns[name] for name in layout.columns}, where)
    table = layout.pack(layout.assemble(layout.apply_transform(decoded, (0, piece.index)), where))
    for name in carried:
        table = table.append_column(f"carried:{name}", _as_arrow(columns[name]))
    return table


class Predictor:
    """Holds a model; called with packed tables.

    Args:
        build: Gives the model.
        layout: Unpacks tables.
        batch_size: Rows that the model is given at a time.
    """

    def __init__(self, build: Callable[[], Any], layout: Layout, batch_size: int) -> None:
        self._model = build()
        self._layout = layout
        self._batch_size = batch_size

    def __call__(self, table: pa.Table) -> pa.Table:
        """Predictions of a table's rows and what it carries, as columns named `kind:name`."""
        import tensorflow as tf

        from raykeras.stream import as_tensors

        x = self._layout.structure(as_tensors(self._layout, self._layout.unpack(table)))[0]
        data = tf.data.Dataset.from_tensor_slices((x,)).batch(self._batch_size)
        columns = _named(self._model, self._model.predict(data, verbose=0))
        columns |= {name: table.column(name) for name in table.column_names if name.startswith("carried:")}
        return pa.table(columns)


class RemotePredictor:
    """A `Predictor` in a process of Ray Data's.

    Args:
        build: Pickled function that gives the model.
        layout, batch_size: As `Predictor`.
    """

    def __init__(self, build: bytes, layout: Layout, batch_size: int) -> None:
        from ray import cloudpickle

        quiet()
        import_tensorflow()
        self._predictor = Predictor(cloudpickle.loads(build), layout, batch_size)

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._predictor(table)


def _named(model: Any, predicted: Any) -> dict[str, Any]:
    """What `predict` returned, as Arrow columns named `kind:name`."""
    if isinstance(predicted, Mapping):
        return {f"dict:{name}": _as_arrow(value) for name, value in predicted.items()}
    if not isinstance(predicted, list | tuple):
        return {f"one:{OUTPUT}": _as_arrow(predicted)}
    names = getattr(model, "output_names", None) or [f"output_{i}" for i in range(len(predicted))]
    return {f"list:{name}": _as_arrow(value) for name, value in zip(names, predicted, strict=True)}


def split_name(column: str) -> tuple[Kind, str]:
    """The kind and the name of a column of predictions."""
    kind, _, name = column.partition(":")
    return kind, name  # type: ignore[return-value]


def column_array(column: pa.ChunkedArray) -> np.ndarray:
    """A column of predictions as an array, rows first."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
    if isinstance(array.type, pa.FixedShapeTensorType):
        return array.to_numpy_ndarray()
    return array.to_numpy(zero_copy_only=False)


def _as_arrow(values: Any) -> Any:
    if not isinstance(values, np.ndarray):
        return values
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
