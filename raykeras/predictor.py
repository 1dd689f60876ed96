"""A model that turns tables of rows, or the user's own batches, into tables of predictions.

Enters: pieces of a source in source order, or batches. Leaves: for each an Arrow table with the model's outputs
and the columns that are carried along. The reading may run anywhere, the model where a `Predictor` is.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raykeras.batches import Batches, Flat
from raykeras.blocks import TASK_NBYTES
from raykeras.columns import Layout
from raykeras.epochs import Epochs
from raykeras.errors import RaykerasError, root_cause
from raykeras.noise import import_tensorflow, quiet
from raykeras.pump import Chunk, alike, as_ours, batches_per_task, chunk_of, chunks_made
from raykeras.reads import TaskFailure
from raykeras.sources import OpenSource, Reader, UnitRef
from raykeras.transfer import unpack_model

OUTPUT = "prediction"
"""The column of a single output."""

Kind = Literal["one", "list", "dict", "carried"]
"""How `Model.predict` returns a column's output; or that it is none of its."""

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

    def of_batches(self, chunk: Chunk) -> pa.Table:
        """Predictions of batches, which go through the model as they are."""
        import tensorflow as tf

        from raykeras.iterated import as_it_is

        ends = tf.constant(np.append(0, np.cumsum(chunk.rows)))
        tensors = [tf.constant(array) for array in chunk.arrays]

        @as_it_is
        def batch(i: tf.Tensor) -> Any:
            return (self._layout.structure([tensor[ends[i] : ends[i + 1]] for tensor in tensors])[0],)

        data = tf.data.Dataset.range(len(chunk.rows)).map(batch)
        return pa.table(_named(self._model, self._model.predict(data, verbose=0)))


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


def predicted_here(batches: Batches, build: Callable[[], Any]) -> Iterator[pa.Table]:
    """Predictions of the user's own batches, in their order, by a model of this process."""
    predictor = Predictor(build, batches.layout, 1)
    for chunk in _groups(batches):
        yield predictor.of_batches(chunk)


def predicted_by_actors(
    batches: Batches, build: bytes, *, num_models: int, num_cpus: float, num_gpus: float, cpus_per_task: float
) -> Generator[pa.Table]:
    """The same by models in processes of their own. What a Sequence makes is made by tasks."""
    import ray

    options = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    actors = [ray.remote(**options)(RemotePredictor).remote(build, batches.layout, 1) for _ in range(num_models)]
    waiting: deque[Any] = deque()
    groups = (
        _made_by_tasks(batches, cpus_per_task)
        if batches.kind == "sequence"
        else (ray.put([g]) for g in _groups(batches))
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


def _groups(batches: Batches) -> Iterator[Chunk]:
    """Consecutive batches of one shape."""
    group: list[Flat] = []
    nbytes = 0
    for batch in _one_pass(batches):
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


def _made_by_tasks(batches: Batches, cpus_per_task: float) -> Iterator[Any]:
    """References to chunks of a Sequence."""
    import ray

    make = ray.remote(num_cpus=cpus_per_task)(chunks_made)
    known, shared = ray.put(batches.without_data()), ray.put(batches.data)
    epochs = Epochs(batches, shuffle=False, seed=0, steps=None, restart=False).indexes()
    indexes = next(epochs)
    while some := list(itertools.islice(indexes, batches_per_task(batches))):
        yield make.remote(known, shared, some, (0, 0), 1)
    epochs.close()


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
