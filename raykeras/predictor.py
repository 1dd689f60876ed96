"""A model that turns tables of rows, or the user's own batches, into tables of predictions.

Enters: pieces of a source in source order, or batches. Leaves: for each an Arrow table with the model's outputs
and the columns that are carried along. The reading may run anywhere, the model where a `Predictor` is.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raykeras.batches import Batches, Flat
from raykeras.blocks import TASK_NBYTES
from raykeras.columns import Layout
from raykeras.epochs import Epochs
from raykeras.errors import RaykerasError, root_cause
from raykeras.keras_api import KerasAPI, api_of
from raykeras.noise import import_tensorflow, quiet
from raykeras.pump import Chunk, alike, as_ours, batches_per_task, chunk_of, chunks_made
from raykeras.reads import TaskFailure
from raykeras.sources import OpenSource, Reader, UnitRef
from raykeras.transfer import unpack_model

OUTPUT = "prediction"
"""The column of a single output."""

Path = tuple[Any, ...]
"""Where an output is in what `Model.predict` returns: keys of dicts, indexes of lists, and `(index,)` of tuples."""

_GROUP_NBYTES, _GROUP_BATCHES = 16 << 20, 256  # of batches that go through one call of `Model.predict`
_GROUPS_AHEAD = 2  # for each model


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
    table = layout.pack(layout.assemble(layout.apply_transform(decoded, (0, piece.index), where), where))
    for name in carried:
        table = table.append_column(_column(None, name), _as_arrow(columns[name]))
    return table


class Predictor:
    """Holds a model; called with packed tables.

    Args:
        build: Gives the model.
        layout: Unpacks tables.
        batch_size: Rows that the model is given at a time.
        callbacks: Keras callbacks, which see one prediction of all tables.
    """

    def __init__(
        self, build: Callable[[], Any], layout: Layout, batch_size: int, callbacks: Sequence[Any] = ()
    ) -> None:
        self._model = build()
        self._layout = layout
        self._batch_size = batch_size
        self._callbacks = _one_prediction(api_of(self._model), callbacks, self._model) if callbacks else None

    def close(self) -> None:
        """End the callbacks' prediction."""
        if self._callbacks is not None:
            self._callbacks.list.on_predict_end()

    def _predicted(self, data: Any, num_batches: int) -> Any:
        if self._callbacks is None:
            return self._model.predict(data, verbose=0)
        predicted = self._model.predict(data, verbose=0, callbacks=[self._callbacks])
        self._callbacks.num_before += num_batches
        return predicted

    def __call__(self, table: pa.Table) -> pa.Table:
        """Predictions of a table's rows and what it carries, as columns named `kind:name`."""
        import tensorflow as tf

        from raykeras.stream import as_tensors

        x = self._layout.element(as_tensors(self._layout, self._layout.unpack(table)))
        data = tf.data.Dataset.from_tensor_slices(x).batch(self._batch_size)
        columns = _named(self._model, self._predicted(data, -(-len(table) // self._batch_size)))
        columns |= {name: table.column(name) for name in table.column_names if name.startswith(_CARRIED)}
        return pa.table(columns)

    def of_batches(self, chunk: Chunk) -> pa.Table:
        """Predictions of batches, which go through the model as they are."""
        import tensorflow as tf

        from raykeras.iterated import as_it_is

        ends = tf.constant(np.append(0, np.cumsum(chunk.rows)))
        tensors = [tf.constant(array) for array in chunk.arrays]

        @as_it_is
        def batch(i: tf.Tensor) -> Any:
            return self._layout.element([tensor[ends[i] : ends[i + 1]] for tensor in tensors])

        data = tf.data.Dataset.range(len(chunk.rows)).map(batch)
        return pa.table(_named(self._model, self._predicted(data, len(chunk.rows))))


def _one_prediction(api: KerasAPI, callbacks: Sequence[Any], model: Any) -> Any:
    """Return a callback that makes one prediction of several for others: its batches are counted through all."""
    every = api.module.callbacks.CallbackList(list(callbacks), add_history=False, add_progbar=False, model=model)

    class OnePrediction(api.module.callbacks.Callback):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.list, self.num_before = every, 0
            every.on_predict_begin()

        def on_predict_batch_begin(self, batch: int, logs: Any = None) -> None:
            every.on_predict_batch_begin(self.num_before + batch, logs)

        def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
            every.on_predict_batch_end(self.num_before + batch, logs)

    return OnePrediction()


class RemotePredictor:
    """A `Predictor` in an actor. It makes the model in its first call, from which an exception comes back whole.

    Args:
        build: Pickled function that gives the model; or a list of a reference to it, which Ray Data hands on as it is.
        layout, batch_size: As `Predictor`.
    """

    def __init__(self, build: bytes | list[Any], layout: Layout, batch_size: int) -> None:
        self._build, self._layout, self._batch_size = build, layout, batch_size

    def __call__(self, table: pa.Table) -> pa.Table:
        try:
            return self._predictor(table)
        except Exception as error:
            raise TaskFailure(as_ours(error)) from None

    def of_batches(self, chunks: Sequence[Chunk]) -> pa.Table:
        try:
            return pa.concat_tables(self._predictor.of_batches(chunk) for chunk in chunks)
        except Exception as error:
            raise as_ours(error) from None

    @functools.cached_property
    def _predictor(self) -> Predictor:
        import ray

        quiet()
        import_tensorflow()
        build = self._build if isinstance(self._build, bytes) else ray.get(self._build[0])
        return Predictor(lambda: unpack_model(build), self._layout, self._batch_size)


def predicted_here(
    batches: Batches, build: Callable[[], Any], steps: int | None, callbacks: Sequence[Any] = ()
) -> Iterator[pa.Table]:
    """Yield predictions of the user's own batches, in their order, by a model of this process."""
    predictor = Predictor(build, batches.layout, 1, callbacks)
    for chunk in _groups(batches, steps):
        yield predictor.of_batches(chunk)
    predictor.close()


def predicted_by_actors(
    batches: Batches,
    build: bytes,
    *,
    steps: int | None,
    num_models: int,
    num_cpus: float,
    num_gpus: float,
    cpus_per_task: float,
) -> Generator[pa.Table]:
    """The same by models in processes of their own. What a Sequence makes is made by tasks."""
    import ray

    options = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    actors = [ray.remote(**options)(RemotePredictor).remote(build, batches.layout, 1) for _ in range(num_models)]
    waiting: deque[Any] = deque()
    groups = (
        _made_by_tasks(batches, cpus_per_task, steps)
        if batches.kind == "sequence"
        else (ray.put([g]) for g in _groups(batches, steps))
    )
    try:
        for actor, group in zip(itertools.cycle(actors), groups, strict=False):
            waiting.append(actor.of_batches.remote(group))
            if len(waiting) >= _GROUPS_AHEAD * num_models:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except Exception as error:
        cause = root_cause(error)
        if cause is error or not isinstance(cause, RaykerasError):
            raise
        raise cause from None
    finally:
        for actor in actors:
            ray.kill(actor)


def _groups(batches: Batches, steps: int | None) -> Iterator[Chunk]:
    """Consecutive batches of one shape."""
    group: list[Flat] = []
    nbytes = 0
    for batch in itertools.islice(_one_pass(batches), steps):
        if group and (nbytes >= _GROUP_NBYTES or len(group) == _GROUP_BATCHES or not alike(group[0], batch)):
            yield chunk_of(group, [len(b[0]) for b in group])
            group, nbytes = [], 0
        group.append(batch)
        nbytes += sum(array.nbytes for array in batch)
    if group:
        yield chunk_of(group, [len(b[0]) for b in group])


def _one_pass(batches: Batches) -> Iterator[Flat]:
    epochs = iter(Epochs(batches, shuffle=False, seed=0, steps=None, restart=False))
    try:
        yield from next(epochs, iter(()))
    except Exception as error:
        raise as_ours(error) from error
    finally:
        epochs.close()


def _made_by_tasks(batches: Batches, cpus_per_task: float, steps: int | None) -> Iterator[Any]:
    """References to chunks of a Sequence."""
    import ray

    make = ray.remote(num_cpus=cpus_per_task)(chunks_made)
    known, shared = ray.put(batches.without_data()), ray.put(batches.data)
    epochs = Epochs(batches, shuffle=False, seed=0, steps=None, restart=False).indexes()
    indexes = itertools.islice(next(epochs), steps)
    while some := list(itertools.islice(indexes, batches_per_task(batches))):
        yield make.remote(known, shared, some, (0, 0), 1)
    epochs.close()


def _named(model: Any, predicted: Any) -> dict[str, Any]:
    """Return what `predict` returned as Arrow columns, whose names tell where each was."""
    leaves = list(_leaves(predicted))
    names = list(getattr(model, "output_names", None) or ())
    is_list = isinstance(predicted, list | tuple) and len(names) == len(leaves)
    columns = {}
    for number, (path, value) in enumerate(leaves):
        if is_list:
            name = str(names[number])
        else:
            name = ".".join(f"output_{part}" if part.isdigit() else part for part in map(_part, path)) or OUTPUT
        columns[_column(path, name)] = _as_arrow(value)
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


def _part(part: Any) -> str:
    return str(part[0] if isinstance(part, tuple) else part)


_CARRIED = "carried:"


def _column(path: Path | None, name: str) -> str:
    return f"{_CARRIED}{name}" if path is None else json.dumps([path, name])


def split_name(column: str) -> tuple[Path | None, str]:
    """Return where a column of predictions was, None for one that is carried along, and its name."""
    if column.startswith(_CARRIED):
        return None, column.removeprefix(_CARRIED)
    path, name = json.loads(column)
    return tuple(tuple(part) if isinstance(part, list) else part for part in path), name


def nested(leaves: Sequence[tuple[Path, Any]]) -> Any:
    """Return values in the dicts, lists and tuples that they were in."""
    first, value = leaves[0]
    if not first:
        return value
    parts: dict[Any, list[tuple[Path, Any]]] = {}
    for path, leaf in leaves:
        parts.setdefault(path[0], []).append((path[1:], leaf))
    made = {key: nested(inner) for key, inner in parts.items()}
    if isinstance(first[0], str):
        return made
    return list(made.values()) if isinstance(first[0], int) else tuple(made.values())


def column_array(column: pa.ChunkedArray) -> np.ndarray:
    """A column of predictions as an array, rows first."""
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


def _as_arrow(values: Any) -> Any:
    if not isinstance(values, np.ndarray):
        return values
    if values.ndim == 1:
        return pa.array(values)
    if values.dtype == bool:  # which Arrow's tensors cannot hold
        column = pa.array(values.ravel())
        for size in reversed(values.shape[1:]):
            column = pa.FixedSizeListArray.from_arrays(column, size)
        return column
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
