"""Predict tables of rows, or the user's batches, into Arrow tables.

A table of predictions holds the model's outputs and the columns that are carried along. Rows may be read anywhere; the
model runs where its `Predictor` is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raykeras.checkpoint.model_io import unpack_model
from raykeras.compat.keras_api import KerasAPI, api_of
from raykeras.compat.quiet import import_tensorflow, quiet
from raykeras.data.adapters.transport import BatchChunk, as_raykeras_error
from raykeras.data.batch_spec import BatchSpec
from raykeras.data.sources.base import OpenSource, Reader, UnitRef
from raykeras.data.streaming.read_tasks import TaskFailure
from raykeras.data.streaming.reader import TASK_NBYTES

OUTPUT = "prediction"
"""Name of the column of a single output."""

Path = tuple[Any, ...]
"""Path to an output in what `Model.predict` returns: keys of dicts, indexes of lists, and `(index,)` for tuples."""

_CARRIED = "carried:"


@dataclass(frozen=True)
class Piece:
    """Rows `start` to below `stop` of a unit; `index` counts the pieces of a source."""

    index: int
    unit: UnitRef
    start: int
    stop: int


def pieces_of(opened: OpenSource, batch_spec: BatchSpec) -> Iterator[Piece]:
    """Yield all rows of a source in order, in pieces of about `TASK_NBYTES`."""
    num_rows = max(1, TASK_NBYTES // batch_spec.row_nbytes)
    index = 0
    for unit in range(len(opened.unit_rows)):
        for start in range(0, int(opened.unit_rows[unit]), num_rows):
            yield Piece(index, opened.unit(unit), start, min(start + num_rows, int(opened.unit_rows[unit])))
            index += 1


def read_piece(reader: Reader, batch_spec: BatchSpec, carried: Sequence[str], piece: Piece) -> pa.Table:
    """Return a table of the packed tensors of a piece, and of the carried columns as they are stored."""
    names = [*batch_spec.columns, *(name for name in carried if name not in batch_spec.columns)]
    columns = reader.read(piece.unit, piece.start, piece.stop, names)
    where = str(piece.unit)
    decoded = batch_spec.decode({name: columns[name] for name in batch_spec.columns}, where)
    table = batch_spec.pack(batch_spec.assemble(batch_spec.apply_transform(decoded, (0, piece.index), where), where))
    for name in carried:
        table = table.append_column(_column_name(None, name), _as_arrow(columns[name]))
    return table


class Predictor:
    """Predicts packed tables, or batches, with one model.

    Args:
        build: Returns the model.
        batch_spec: Spec of the packed tensors.
        batch_size: Rows per batch of a table.
        callbacks: Keras callbacks, which see the tables as one call of `predict`.
    """

    def __init__(
        self, build: Callable[[], Any], batch_spec: BatchSpec, batch_size: int, callbacks: Sequence[Any] = ()
    ) -> None:
        self._model = build()
        self._batch_spec = batch_spec
        self._batch_size = batch_size
        self._callbacks = _joint_callback(api_of(self._model), callbacks, self._model) if callbacks else None

    def close(self) -> None:
        """Call `on_predict_end` of the callbacks."""
        if self._callbacks is not None:
            self._callbacks.list.on_predict_end()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the predictions of a table's rows, and its carried columns; see `split_name` for the names."""
        import tensorflow as tf

        from raykeras.data.streaming.dataset import as_tensors

        x = self._batch_spec.element(as_tensors(self._batch_spec, self._batch_spec.unpack(table)))
        data = tf.data.Dataset.from_tensor_slices(x).batch(self._batch_size)
        columns = _columns_of(self._model, self._predict(data, -(-len(table) // self._batch_size)))
        columns |= {name: table.column(name) for name in table.column_names if name.startswith(_CARRIED)}
        return pa.table(columns)

    def of_batches(self, chunk: BatchChunk) -> pa.Table:
        """Return the predictions of batches, which go through the model unchanged."""
        import tensorflow as tf

        from raykeras.data.tf_dataset import no_autograph

        ends = tf.constant(np.append(0, np.cumsum(chunk.rows)))
        tensors = [tf.constant(array) for array in chunk.arrays]

        @no_autograph
        def batch(i: tf.Tensor) -> Any:
            return self._batch_spec.element([tensor[ends[i] : ends[i + 1]] for tensor in tensors])

        data = tf.data.Dataset.range(len(chunk.rows)).map(batch)
        return pa.table(_columns_of(self._model, self._predict(data, len(chunk.rows))))

    def _predict(self, data: Any, num_batches: int) -> Any:
        if self._callbacks is None:
            return self._model.predict(data, verbose=0)
        predicted = self._model.predict(data, verbose=0, callbacks=[self._callbacks])
        self._callbacks.num_before += num_batches
        return predicted


class RemotePredictor:
    """A `Predictor` in an actor.

    It builds the model in its first call and not in its constructor, so that the caller gets the exception if that
    fails.

    Args:
        build: Pickled function that returns the model; or a list of a reference to it, which Ray Data passes unchanged.
        batch_spec, batch_size: As for `Predictor`.
    """

    def __init__(self, build: bytes | list[Any], batch_spec: BatchSpec, batch_size: int) -> None:
        self._build, self._batch_spec, self._batch_size = build, batch_spec, batch_size

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the predictions of a table; see `Predictor.__call__`."""
        try:
            return self._predictor(table)
        except Exception as error:
            raise TaskFailure(as_raykeras_error(error)) from None

    def of_batches(self, chunks: Sequence[BatchChunk]) -> pa.Table:
        """Return the predictions of batches in one table."""
        try:
            return pa.concat_tables(self._predictor.of_batches(chunk) for chunk in chunks)
        except Exception as error:
            raise as_raykeras_error(error) from None

    @functools.cached_property
    def _predictor(self) -> Predictor:
        import ray

        quiet()
        import_tensorflow()
        build = self._build if isinstance(self._build, bytes) else ray.get(self._build[0])
        return Predictor(lambda: unpack_model(build), self._batch_spec, self._batch_size)


def split_name(column: str) -> tuple[Path | None, str]:
    """Return the path and the name of a column of predictions; the path of a carried column is None."""
    if column.startswith(_CARRIED):
        return None, column.removeprefix(_CARRIED)
    path, name = json.loads(column)
    return tuple(tuple(key) if isinstance(key, list) else key for key in path), name


def nested(leaves: Sequence[tuple[Path, Any]]) -> Any:
    """Return values in the dicts, lists and tuples that their paths describe."""
    first, value = leaves[0]
    if not first:
        return value
    groups: dict[Any, list[tuple[Path, Any]]] = {}
    for path, leaf in leaves:
        groups.setdefault(path[0], []).append((path[1:], leaf))
    items = {key: nested(inner) for key, inner in groups.items()}
    if isinstance(first[0], str):
        return items
    return list(items.values()) if isinstance(first[0], int) else tuple(items.values())


def column_array(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of predictions as an array, rows first."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
    if isinstance(array.type, pa.FixedShapeTensorType):
        return array.to_numpy_ndarray()
    shape = [len(array)]
    while isinstance(array.type, pa.FixedSizeListType):
        shape.append(array.type.list_size)
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False).reshape(shape)


def _joint_callback(api: KerasAPI, callbacks: Sequence[Any], model: Any) -> Any:
    """Return a callback that shows several calls of `predict` to others as one, with batches counted over all."""
    callback_list = api.module.callbacks.CallbackList(
        list(callbacks), add_history=False, add_progbar=False, model=model
    )

    class JointCallback(api.module.callbacks.Callback):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.list, self.num_before = callback_list, 0
            callback_list.on_predict_begin()

        def on_predict_batch_begin(self, batch: int, logs: Any = None) -> None:
            callback_list.on_predict_batch_begin(self.num_before + batch, logs)

        def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
            callback_list.on_predict_batch_end(self.num_before + batch, logs)

    return JointCallback()


def _columns_of(model: Any, predicted: Any) -> dict[str, Any]:
    """Return what `predict` returned as Arrow columns, whose names hold their paths."""
    leaves = list(_leaves(predicted))
    names = list(getattr(model, "output_names", None) or ())
    is_list = isinstance(predicted, list | tuple) and len(names) == len(leaves)
    columns = {}
    for number, (path, value) in enumerate(leaves):
        if is_list:
            name = str(names[number])
        else:
            name = ".".join(f"output_{key}" if key.isdigit() else key for key in map(_key_text, path)) or OUTPUT
        columns[_column_name(path, name)] = _as_arrow(value)
    return columns


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _leaves(item, (*path, i if isinstance(value, list) else (i,)))
    else:
        yield path, value


def _key_text(key: Any) -> str:
    return str(key[0] if isinstance(key, tuple) else key)


def _column_name(path: Path | None, name: str) -> str:
    return f"{_CARRIED}{name}" if path is None else json.dumps([path, name])


def _as_arrow(values: Any) -> Any:
    if not isinstance(values, np.ndarray):
        return values
    if values.ndim == 1:
        return pa.array(values)
    if values.dtype == bool:  # Arrow's tensors cannot hold it
        column = pa.array(values.ravel())
        for size in reversed(values.shape[1:]):
            column = pa.FixedSizeListArray.from_arrays(column, size)
        return column
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
