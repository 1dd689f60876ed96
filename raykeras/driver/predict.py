"""`raykeras.predict`: batch inference in this process, or with one model per replica on a Ray cluster.

The rows of a source are read by Ray Data tasks on any free CPU and predicted in source order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from raykeras.checkpoint.model_io import as_model, pack_model
from raykeras.compat.keras_api import current_floatx
from raykeras.compat.quiet import import_tensorflow, quiet
from raykeras.compat.ray_data import ReadAhead, ReadLimits
from raykeras.compat.versions import check_installed
from raykeras.core.config import Scale
from raykeras.core.error_context import root_cause
from raykeras.core.errors import OptionError, RaykerasError
from raykeras.core.tracebacks import without_frames
from raykeras.data.adapters.adapter import Batches, Flat, as_batches
from raykeras.data.adapters.epochs import Epochs
from raykeras.data.adapters.transport import (
    BatchChunk,
    as_raykeras_error,
    batches_per_task,
    chunk_of,
    have_same_shapes,
    make_chunks,
)
from raykeras.data.batch_spec import BatchSpec
from raykeras.data.inputs import as_source, check_picklable, check_positive, check_scale_and_run
from raykeras.data.resolve import resolve
from raykeras.data.sources.arrays import ArrayReader
from raykeras.data.sources.base import OpenSource
from raykeras.data.streaming.read_tasks import planned_dataset
from raykeras.data.streaming.resources import reading
from raykeras.driver.callback import only_keras_callbacks
from raykeras.driver.cluster import connect
from raykeras.driver.evaluate import with_fixed_workers
from raykeras.driver.output import Output, open_output
from raykeras.driver.shared_paths import check_sources
from raykeras.driver.worker_group import runs_here
from raykeras.worker.predictor import (
    Predictor,
    RemotePredictor,
    column_array,
    nested,
    pieces_of,
    read_piece,
    split_name,
)

_GROUP_NBYTES, _GROUP_BATCHES = 16 << 20, 256  # of the batches that one call of `Model.predict` predicts


_GROUPS_AHEAD = 2  # per model


def _predict_batches_here(
    batches: Batches, build: Callable[[], Any], steps: int | None, callbacks: Sequence[Any] = ()
) -> Iterator[pa.Table]:
    """Yield predictions of user-made batches, in order, with a model in this process."""
    predictor = Predictor(build, batches.batch_spec, 1, callbacks)
    for chunk in _groups(batches, steps):
        yield predictor.of_batches(chunk)
    predictor.close()


def _predict_batches_with_actors(
    batches: Batches,
    build: bytes,
    *,
    steps: int | None,
    num_models: int,
    num_cpus: float,
    num_gpus: float,
    cpus_per_task: float,
) -> Generator[pa.Table]:
    """Yield predictions of user-made batches, in order, with models in actors.

    The batches of a Sequence are made by Ray tasks, and all others by this process.

    Args:
        batches: Batches to predict.
        build: Pickled function that builds the model.
        steps: Number of batches to predict; None for all.
        num_models: Number of actors.
        num_cpus: Logical CPUs of each actor.
        num_gpus: GPUs of each actor.
        cpus_per_task: Logical CPUs of each task that makes batches.

    Raises:
        RaykerasError: If the model or the batches raise an exception.
    """
    import ray

    options = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    actors = [ray.remote(**options)(RemotePredictor).remote(build, batches.batch_spec, 1) for _ in range(num_models)]
    pending: deque[Any] = deque()
    groups = (
        _make_in_tasks(batches, cpus_per_task, steps)
        if batches.kind == "sequence"
        else (ray.put([group]) for group in _groups(batches, steps))
    )
    try:
        for actor, group in zip(itertools.cycle(actors), groups, strict=False):
            pending.append(actor.of_batches.remote(group))
            if len(pending) >= _GROUPS_AHEAD * num_models:
                yield ray.get(pending.popleft())
        while pending:
            yield ray.get(pending.popleft())
    except Exception as error:
        cause = root_cause(error)
        if cause is error or not isinstance(cause, RaykerasError):
            raise
        raise cause from None
    finally:
        for actor in actors:
            ray.kill(actor)


def _groups(batches: Batches, steps: int | None) -> Iterator[BatchChunk]:
    """Yield groups of consecutive batches of one shape."""
    group: list[Flat] = []
    nbytes = 0
    for batch in itertools.islice(_one_pass(batches), steps):
        if group and (nbytes >= _GROUP_NBYTES or len(group) == _GROUP_BATCHES or not have_same_shapes(group[0], batch)):
            yield chunk_of(group, [len(b[0]) for b in group])
            group, nbytes = [], 0
        group.append(batch)
        nbytes += sum(array.nbytes for array in batch)
    if group:
        yield chunk_of(group, [len(b[0]) for b in group])


def _one_pass(batches: Batches) -> Iterator[Flat]:
    """Yield the batches of one pass over the data."""
    epochs = iter(Epochs(batches, shuffle=False, seed=0, steps=None, restart=False))
    try:
        yield from next(epochs, iter(()))
    except Exception as error:
        raise as_raykeras_error(error) from error
    finally:
        epochs.close()


def _make_in_tasks(batches: Batches, cpus_per_task: float, steps: int | None) -> Iterator[Any]:
    """Yield references to lists of chunks, which Ray tasks make from a Sequence."""
    import ray

    make = ray.remote(num_cpus=cpus_per_task)(make_chunks)
    metadata, sequence = ray.put(batches.without_data()), ray.put(batches.data)
    epochs = Epochs(batches, shuffle=False, seed=0, steps=None, restart=False).indexes()
    indexes = itertools.islice(next(epochs), steps)
    while task_indexes := list(itertools.islice(indexes, batches_per_task(batches))):
        yield make.remote(metadata, sequence, task_indexes, (0, 0), 1)
    epochs.close()


@without_frames
def predict(
    model: Any,
    x: Any,
    *,
    batch_size: int | None = None,
    steps: int | None = None,
    callbacks: Sequence[Any] | Any | None = None,
    scale: Scale | None = None,
    output: str | None = None,
    columns: Sequence[str] = (),
    safe_mode: bool = True,
) -> Any:
    """Generate predictions for the input rows, in their order, on one machine or on a Ray cluster.

    Args:
        model: Model to predict with, in any form that `evaluate` accepts. It does not need to be compiled.
        x: Input data, in any form that `fit` accepts. Targets and sample weights are ignored.
        batch_size: Integer or `None`. Number of rows per batch of a replica. Defaults to 32. Ignored if `x` yields
            batches.
        steps: Integer or `None`. Number of batches to predict, from the first one. `None` predicts all of them.
            Required if `x` is infinite.
        callbacks: List of `keras.callbacks.Callback` instances, or a single one. Only supported if one model predicts
            in this process.
        scale: `raykeras.Scale` with a fixed number of workers. One model per replica predicts. Defaults to one model in
            this process.
        output: Optional local folder or fsspec URL to write the predictions to, as Parquet files and a final
            `_SUCCESS`. It must be new, empty, or the incomplete output of an earlier call, which is replaced. A local
            folder appears complete or not at all. On an object store, the folder contains `_INCOMPLETE` until it is
            complete, and `raykeras.parquet` refuses to read it.
        columns: List of names of columns of the source to write together with the predictions. Requires `output`.
        safe_mode: Boolean. Whether to refuse a `.keras` file that contains code, as in `fit`.

    Returns:
        An array of predictions of shape `(rows, ...)`, or a list or dict of arrays, as from `keras.Model.predict`. If
        `output` is given, its path. The columns of the files are named after the outputs, or `"prediction"` if the
        model returns a single array.

    Raises:
        ValidationError: If an argument, the data or the model is invalid. The message says what to change.
        ResourceError: If the cluster can never provide the requested resources.
        UserCodeError: If the user's code raises an exception.
        CheckpointError: If the checkpoint does not exist or cannot be read.
        RaykerasError: If the output cannot be written.
    """
    check_installed()
    check_scale_and_run(scale)
    scale = with_fixed_workers(scale or Scale())
    batch_size = check_positive("batch_size", 32 if batch_size is None else batch_size)
    if steps is not None:
        check_positive("steps", steps)
    keras_callbacks = only_keras_callbacks(callbacks, "predict")
    if keras_callbacks and not _predicts_here(scale):
        raise OptionError(
            f"`callbacks` of `predict` need the model in this process; got {scale}. Leave `scale` or `callbacks` out."
        )
    model = as_model(model, safe_mode=safe_mode)
    if columns and output is None:
        raise OptionError(
            f"`columns` are written to `output`, together with the predictions; got {list(columns)} without `output`. "
            "Pass `output`."
        )
    quiet()
    batches = as_batches(x, current_floatx())
    if batches is not None:
        _check_batches(batches, columns, scale, steps)
        target = None if output is None else open_output(output)
        with contextlib.closing(_batch_predictions(model, batches.x_only(), scale, steps, keras_callbacks)) as tables:
            return _write_or_return(tables, target)
    source, structures = as_source(x, None, None)
    source = dataclasses.replace(source, y=None, sample_weight=None)
    opened = source.open()
    if steps is not None:
        opened = opened.slice(0, min(opened.num_rows, steps * batch_size))
    batch_spec = resolve(source, opened, floatx=current_floatx(), structures=structures)
    for name in columns:
        opened.field(name)
    target = None if output is None else open_output(output)
    rows = _SourceRows(opened, batch_spec, tuple(columns))
    with contextlib.closing(_source_predictions(model, rows, batch_size, scale, keras_callbacks)) as tables:
        return _write_or_return(tables, target)


def _check_batches(batches: Batches, columns: Sequence[str], scale: Scale, steps: int | None) -> None:
    """Raise OptionError if user-made batches cannot be predicted with these arguments."""
    if columns:
        raise OptionError(
            f"`columns` must be columns of a source; got {list(columns)} and a {batches.type_name}, which has none. "
            "Leave `columns` out: the predictions are in the order of the batches."
        )
    if batches.is_infinite and steps is None:
        raise OptionError(
            f"`predict` needs finite data, since it predicts every row once; got an infinite {batches.type_name}. Pass "
            "`steps`."
        )
    if batches.kind == "sequence" and not _predicts_here(scale):
        check_picklable(batches.data)


def _write_or_return(tables: Generator[pa.Table], target: Output | None) -> Any:
    """Write the predictions and return the path, or return them as arrays.

    The generator is closed even if an exception's traceback still refers to it, so that its models are released.
    """
    with contextlib.closing(tables):
        if target is None:
            return _as_arrays(list(tables))
        target.write(map(_renamed, tables))
        return target.path


def _predicts_here(scale: Scale) -> bool:
    """Return whether one model in this process predicts all rows; more replicas on its CPUs would not be faster."""
    return runs_here(scale) and (scale.total_replicas == 1 or not scale.gpus_per_worker)


def _batch_predictions(
    model: Any, batches: Batches, scale: Scale, steps: int | None, callbacks: list[Any]
) -> Generator[pa.Table]:
    """Yield tables of predictions of user-made batches, in order."""
    from ray import cloudpickle

    if _predicts_here(scale):
        import_tensorflow()
        _, build = pack_model(model, lazily=True)
        build_model = cloudpickle.loads(build) if build else lambda: model
        yield from _predict_batches_here(batches, build_model, steps, callbacks)
        return
    _, build = pack_model(model)
    budget = connect(scale, in_process=False)
    yield from _predict_batches_with_actors(
        batches,
        build,
        steps=steps,
        num_models=scale.total_replicas,
        num_cpus=budget.cpus_per_worker / scale.local_replicas,
        num_gpus=1 if scale.gpus_per_worker else 0,
        cpus_per_task=budget.cpus_per_task,
    )


@dataclass(frozen=True)
class _SourceRows:
    """The rows of a source, piece by piece in source order.

    Attributes:
        opened, batch_spec: The source, and what is predicted from.
        columns: Columns of the source to write with the predictions.
    """

    opened: OpenSource
    batch_spec: BatchSpec
    columns: tuple[str, ...]

    def tables(self) -> Iterator[pa.Table]:
        """Yield the pieces, read in this thread."""
        for piece in pieces_of(self.opened, self.batch_spec):
            yield read_piece(self.opened.reader, self.batch_spec, self.columns, piece)

    def dataset(self, limits: ReadLimits, read_ahead: ReadAhead) -> Any:
        """Return a Ray Data dataset of the pieces."""
        import ray

        pieces = list(pieces_of(self.opened, self.batch_spec))
        return planned_dataset(
            read_piece,
            ray.put((self.opened.reader, self.batch_spec, self.columns)),
            pieces,
            [piece.stop - piece.start for piece in pieces],
            row_nbytes=self.batch_spec.row_nbytes,
            reading=limits,
            consumer=read_ahead,
        )


def _source_predictions(
    model: Any, rows: _SourceRows, batch_size: int, scale: Scale, callbacks: list[Any]
) -> Generator[pa.Table]:
    """Yield tables of predictions of a source, in source order; see `raykeras.worker.predictor`."""
    from ray import cloudpickle

    in_process = _predicts_here(scale)
    _, build = pack_model(model, lazily=in_process)
    if not in_process:
        yield from _predict_rows_by_actors(rows, build, batch_size, scale)
        return
    import_tensorflow()
    build_model = cloudpickle.loads(build) if build else lambda: model
    predict_table = Predictor(build_model, rows.batch_spec, batch_size, callbacks)
    for table in rows.tables() if rows.opened.reader.in_memory else _read_by_tasks(rows, scale):
        yield predict_table(table)
    predict_table.close()


def _read_by_tasks(rows: _SourceRows, scale: Scale) -> Iterator[pa.Table]:
    budget, read_ahead = connect(scale, in_process=True), ReadAhead()
    check_sources([rows.opened])
    limits = reading(dataclasses.replace(budget, cpus_per_worker=0.0), 1, 1)
    yield from _taken(rows.dataset(limits, read_ahead), read_ahead)


def _predict_rows_by_actors(rows: _SourceRows, build: bytes, batch_size: int, scale: Scale) -> Iterator[pa.Table]:
    import ray

    budget, read_ahead = connect(scale, in_process=False), ReadAhead()
    check_sources([rows.opened])
    if not runs_here(scale) and isinstance(rows.opened.reader, ArrayReader):
        rows.opened.reader.share()
    limits = reading(dataclasses.replace(budget, cpus_per_worker=0.0), 1, 1)
    # Ray Data's limit includes the CPUs of the actors
    limits = dataclasses.replace(limits, cpus=limits.cpus + budget.cpus_per_worker * scale.workers)
    transformed_spec = dataclasses.replace(rows.batch_spec, transform=None)  # the read tasks have applied it
    dataset = rows.dataset(limits, read_ahead).map_batches(
        RemotePredictor,
        fn_constructor_args=([ray.put(build)], transformed_spec, batch_size),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=scale.total_replicas),
        num_cpus=budget.cpus_per_worker / scale.local_replicas,
        num_gpus=1 if scale.gpus_per_worker else 0,
    )
    yield from _taken(dataset, read_ahead)


def _taken(dataset: Any, read_ahead: ReadAhead) -> Iterator[pa.Table]:
    """Yield the tables of a dataset, and let it read on as they are taken."""
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            read_ahead.take()
            yield table
        return
    except Exception as error:
        cause = root_cause(error)
        failure = cause if isinstance(cause, RaykerasError) else error
    gc.collect()  # Ray Data's exception and the actors refer to each other, which keeps their CPUs and GPUs reserved
    raise failure


def _as_arrays(tables: list[pa.Table]) -> Any:
    """Return predictions in the structure that `Model.predict` returns."""
    table = pa.concat_tables(tables)
    leaves = [(split_name(column)[0] or (), column_array(table.column(column))) for column in table.column_names]
    return nested(leaves)


def _renamed(table: pa.Table) -> pa.Table:
    """Return the table with columns named after the outputs."""
    return table.rename_columns([split_name(column)[1] for column in table.column_names])
