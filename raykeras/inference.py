"""`evaluate` and `predict` on a cluster.

Enters: a model, and a source or batches. Leaves: metrics over every row, counted once; or predictions in
the order of the rows, as arrays or as Parquet.

`evaluate` runs Keras' own `evaluate` on the workers, over their shards. `predict` is Ray Data's batch
inference: rows are read where there is a free CPU and predicted by one model for each replica.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Generator, Sequence
from typing import Any

import pyarrow as pa

from raykeras.arguments import (
    as_source,
    check_batch_size,
    check_positive,
    check_scale_and_run,
    split_callbacks,
)
from raykeras.batches import Batches, as_batches
from raykeras.cluster import Room, connect, reading, room_found
from raykeras.columns import Layout
from raykeras.data import check_picklable, for_workers, in_memory, open_data, read_ahead, validation_orders
from raykeras.errors import OptionError, RaykerasError, loading, root_cause
from raykeras.group import run_here, run_on_workers, runs_here
from raykeras.keras_api import api_of, current_floatx
from raykeras.logs import Logs
from raykeras.noise import import_tensorflow, quiet
from raykeras.options import Scale
from raykeras.orders import EvaluationOrders
from raykeras.output import Output, open_output
from raykeras.placement import OnChief, hand_back, pack, states_of, unwrapped
from raykeras.predictor import (
    Predictor,
    RemotePredictor,
    column_array,
    nested,
    pieces_of,
    predicted_by_actors,
    predicted_here,
    read_piece,
    split_name,
)
from raykeras.reads import Consumer, planned_dataset
from raykeras.sources import OpenSource
from raykeras.sources.arrays import ArrayReader
from raykeras.specs import resolve
from raykeras.tracebacks import without_frames
from raykeras.transfer import as_model, is_model, pack_model, unpack_model


@without_frames
def evaluate(
    model: Any,
    x: Any,
    y: Any = None,
    *,
    batch_size: int | None = None,
    sample_weight: Any = None,
    steps: int | None = None,
    callbacks: Sequence[Any] | Any | None = None,
    scale: Scale | None = None,
    seed: int = 0,
    safe_mode: bool = True,
    return_dict: bool = True,
) -> Any:
    """Evaluates a model, as `Model.evaluate` does, on one machine or many. Every row counts once.

    Args:
        model: A compiled model, a function that builds one, a `Checkpoint`, or the path of a
            checkpoint or of a `.keras` file.
        x: A source, or whatever `fit` takes.
        y: As in `fit`.
        batch_size: Rows of a global batch, over all replicas; 32 by default.
        sample_weight: As in `fit`.
        steps: Evaluate the first so many batches only.
        callbacks: Keras callbacks. With several workers they run on each, and yours have the chief's attributes then.
        scale: Workers, GPUs and replicas.
        seed: Seeds random layers.
        safe_mode: As in `fit`.
        return_dict: Whether to return a dict; else a list as Keras does, or the loss alone.

    Returns:
        Metric to its value: a float, or an array of a metric with several.

    Raises:
        ValidationError, ResourceError, UserCodeError: As `fit`.
    """
    check_scale_and_run(scale)
    scale = _fixed(scale or Scale())
    batch_size = check_batch_size("batch_size", 32 if batch_size is None else batch_size, scale)
    if steps is not None:
        check_positive("steps", steps)
    model = as_model(model, safe_mode=safe_mode)
    quiet()
    floatx = current_floatx()
    given = open_data(x, y, sample_weight, floatx)
    common: dict[str, Any] = {"scale": scale, "seed": seed, "floatx": floatx}
    data = validation_orders(given, batch_size=batch_size, steps=steps, steps_name="steps", **common)
    here = runs_here(scale)
    read_ahead([data])
    room = Room() if here and in_memory([data]) else connect(scale, in_process=here)
    orders = EvaluationOrders(data, scale, seed, room)
    _, every = split_callbacks(callbacks)
    if here:
        logs, values = _evaluate_here(orders, model, every)
    else:
        import ray
        from ray import cloudpickle

        packed = (*pack_model(model), pack(every, cloudpickle.dumps))
        with for_workers(data, scale.workers, room.cpus_per_task) as shared:
            task = ray.put((dataclasses.replace(orders, data=shared), *packed, "tensorflow" in sys.modules))
            config, cpus = {"task": task}, room.cpus_per_worker
            logs, values, states = run_on_workers(_evaluate, config, scale=scale, cpus_per_worker=cpus)
        hand_back(every, states, cloudpickle.loads)
    if return_dict:
        return logs
    return values if len(values) > 1 else values[0]


def _evaluate_here(orders: EvaluationOrders, model: Any, callbacks: list[Any]) -> tuple[Logs, list[Any]]:
    import_tensorflow()
    from ray import cloudpickle

    from raykeras import worker

    is_kept = is_model(model) and not api_of(model).is_legacy  # see `raykeras.mirroring`
    api, build = pack_model(model, lazily=is_kept or orders.scale.replicas == 1)

    def built() -> Any:
        return cloudpickle.loads(build)() if build else model

    def work() -> tuple[Logs, list[Any]]:
        return worker.evaluate(orders, rank=0, api=api, build=built, callbacks=unwrapped(callbacks))

    logs, values = run_here(work)
    return logs, values


def _evaluate(config: dict[str, Any]) -> tuple[Logs, list[Any], list[dict[str, bytes]]]:
    """What runs on each worker."""
    quiet()
    import_tensorflow()
    import ray
    import ray.train
    from ray import cloudpickle

    from raykeras import worker

    rank = ray.train.get_context().get_world_rank()
    with loading(rank):
        orders, api, build, packed, keras_there = ray.get(config["task"])
        every = cloudpickle.loads(packed)
    if not in_memory([orders.data]):
        orders = dataclasses.replace(orders, room=room_found(orders.room, rank))
    mine = unwrapped(every if rank == 0 else [callback for callback in every if not isinstance(callback, OnChief)])
    logs, values = worker.evaluate(orders, rank=rank, api=api, build=lambda: unpack_model(build, rank), callbacks=mine)
    return logs, values, states_of(mine, keras_there) if rank == 0 else []


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
    """Predicts every row, in the order of the source.

    Args:
        model: As `evaluate` takes it; it need not be compiled.
        x: A source, arrays, or batches as `fit` takes them. y and weights are not used.
        batch_size: Rows that a replica is given at a time, 32 by default; batches of x's own are taken as they are.
        steps: Predict the first so many batches only.
        callbacks: Keras callbacks, for one replica in this process.
        scale: How many models predict at a time: one for each replica.
        output: Folder or fsspec URL to write Parquet files to, and `_SUCCESS` once all are there. It must
            not hold anything but the output of a call that was stopped. A local folder is there whole or
            not at all; one of an object store holds `_INCOMPLETE` until it is whole, and is no source.
        columns: Columns of the source to write beside the predictions.
        safe_mode: As in `fit`.

    Returns:
        What `Model.predict` returns: an array (rows, …), or a list or dict of them by output. With
        `output`, that path; its columns are named by the outputs, a single one "prediction".

    Raises:
        ValidationError, ResourceError, UserCodeError: As `fit`.
    """
    check_scale_and_run(scale)
    scale = _fixed(scale or Scale())
    batch_size = check_positive("batch_size", 32 if batch_size is None else batch_size)
    if steps is not None:
        check_positive("steps", steps)
    _, every = split_callbacks(callbacks)
    if every and not _predicts_here(scale):
        raise OptionError(
            f"`callbacks` of `predict` need the model in this process; got {scale}. Leave `scale` or `callbacks` out."
        )
    model = as_model(model, safe_mode=safe_mode)
    if columns and output is None:
        raise OptionError(f"`columns` are written beside the predictions; got {list(columns)} without `output`.")
    quiet()
    batches = as_batches(x, current_floatx())
    if batches is not None:
        _check_batches(batches, columns, scale, steps)
        target = None if output is None else open_output(output)
        with contextlib.closing(_batch_predictions(model, batches.of_x(), scale, steps, every)) as tables:
            return _handed_out(tables, target)
    source, structures = as_source(x, None, None)
    source = dataclasses.replace(source, y=None, sample_weight=None)
    opened = source.open()
    if steps is not None:
        opened = opened.slice(0, min(opened.num_rows, steps * batch_size))
    layout = resolve(source, opened, floatx=current_floatx(), structures=structures)
    for name in columns:
        opened.field(name)
    target = None if output is None else open_output(output)
    with contextlib.closing(_predictions(model, opened, layout, tuple(columns), batch_size, scale, every)) as tables:
        return _handed_out(tables, target)


def _check_batches(batches: Batches, columns: Sequence[str], scale: Scale, steps: int | None) -> None:
    if columns:
        raise OptionError(
            f"`columns` are those of a source; got {list(columns)}, and a {batches.described}, which has none. Put the "
            "predictions together with your own columns by their order."
        )
    if batches.is_infinite and steps is None:
        raise OptionError(
            f"`predict` goes through the data once, so that it must have an end; got an infinite {batches.described}. "
            "Give `steps`."
        )
    if batches.kind == "sequence" and not _predicts_here(scale):
        check_picklable(batches.data)


def _handed_out(tables: Generator[pa.Table], target: Output | None) -> Any:
    """What `predict` returns. The models end with it, and not once an exception's traceback is forgotten."""
    with contextlib.closing(tables):
        if target is None:
            return _as_returned(list(tables))
        target.write(map(_renamed, tables))
        return target.path


def _predicts_here(scale: Scale) -> bool:
    """Whether one model in this process predicts all rows; several replicas on its CPUs would not be faster."""
    return runs_here(scale) and (scale.num_replicas == 1 or not scale.gpus_per_worker)


def _batch_predictions(
    model: Any, batches: Batches, scale: Scale, steps: int | None, callbacks: list[Any]
) -> Generator[pa.Table]:
    """Tables of predictions of the user's own batches, in their order."""
    from ray import cloudpickle

    if _predicts_here(scale):
        import_tensorflow()
        _, build = pack_model(model, lazily=True)
        yield from predicted_here(batches, cloudpickle.loads(build) if build else lambda: model, steps, callbacks)
        return
    _, build = pack_model(model)
    room = connect(scale, in_process=False)
    yield from predicted_by_actors(
        batches,
        build,
        steps=steps,
        num_models=scale.num_replicas,
        num_cpus=room.cpus_per_worker / scale.replicas,
        num_gpus=1 if scale.gpus_per_worker else 0,
        cpus_per_task=room.cpus_per_task,
    )


def _predictions(
    model: Any,
    opened: OpenSource,
    layout: Layout,
    columns: tuple[str, ...],
    batch_size: int,
    scale: Scale,
    callbacks: list[Any],
) -> Generator[pa.Table]:
    """Tables of predictions in source order; see `raykeras.predictor`."""
    from ray import cloudpickle

    in_process = _predicts_here(scale)
    _, build = pack_model(model, lazily=in_process)
    pieces = list(pieces_of(opened, layout))
    predict_table = None
    if in_process:
        import_tensorflow()
        make = cloudpickle.loads(build) if build else lambda: model
        predict_table = Predictor(make, layout, batch_size, callbacks)
        if opened.reader.in_memory:
            for piece in pieces:
                yield predict_table(read_piece(opened.reader, layout, columns, piece))
            predict_table.close()
            return
    import ray

    room, consumer = connect(scale, in_process=in_process), Consumer()
    if not runs_here(scale) and isinstance(opened.reader, ArrayReader):
        opened.reader.share()
    limits = reading(dataclasses.replace(room, cpus_per_worker=0.0), 1, 1)
    if not in_process:  # of which Ray Data counts the actors, too
        limits = dataclasses.replace(limits, cpus=limits.cpus + room.cpus_per_worker * scale.workers)
    shared = ray.put((opened.reader, layout, columns))
    dataset = planned_dataset(
        read_piece,
        shared,
        pieces,
        [piece.stop - piece.start for piece in pieces],
        row_nbytes=layout.row_nbytes,
        reading=limits,
        consumer=consumer,
    )
    if not in_process:
        applied = dataclasses.replace(layout, transform=None)  # the tasks that read have called it
        dataset = dataset.map_batches(
            RemotePredictor,
            fn_constructor_args=([ray.put(build)], applied, batch_size),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=scale.num_replicas),
            num_cpus=room.cpus_per_worker / scale.replicas,
            num_gpus=1 if scale.gpus_per_worker else 0,
        )
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            consumer.take()
            yield predict_table(table) if predict_table else table
        if predict_table:
            predict_table.close()
        return
    except Exception as error:
        cause = root_cause(error)
        failure = cause if isinstance(cause, RaykerasError) else error
    gc.collect()  # what Ray Data raises and the models' actors hold each other, and their CPUs and GPUs
    raise failure


def _as_returned(tables: list[pa.Table]) -> Any:
    whole = pa.concat_tables(tables)
    leaves = [(split_name(column)[0] or (), column_array(whole.column(column))) for column in whole.column_names]
    return nested(leaves)


def _renamed(table: pa.Table) -> pa.Table:
    """With columns named by the outputs."""
    return table.rename_columns([split_name(column)[1] for column in table.column_names])


def _fixed(scale: Scale) -> Scale:
    """The scale, which says how many workers there are."""
    if scale.least_workers is not None:
        raise OptionError(
            f"A pair of `workers` is for `fit`; got ({scale.least}, {scale.workers}) here. Give one number of workers."
        )
    return scale
