"""Resolve the column specs of x, y and sample_weight against a source's schema into a `BatchSpec`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from raykeras.core.errors import ColumnError, OptionError, ValidationError
from raykeras.core.structures import Structure
from raykeras.data.batch_spec import BatchSpec, ElementSpec, Role, class_weighted_shape
from raykeras.data.sources.base import Field, OpenSource, Source, Spec, did_you_mean, flat_names, join_names

ClassWeight = Mapping[Any, Any]
"""Class to weight, or such a mapping by output name."""


_PROBED_ROWS = 8


_CHECKED_NBYTES = 64 << 20


_READ_THREADS = 8


def resolve(
    source: Source,
    opened: OpenSource,
    *,
    class_weight: ClassWeight | None = None,
    floatx: str = "float32",
    structures: Mapping[Role, Structure] | None = None,
) -> BatchSpec:
    """Return the batch spec of a source. If there is a transform, it is run on the first rows to learn its columns.

    Args:
        source: The source, with its column specs.
        opened: Its schema and rows.
        class_weight: Weights of classes, multiplied into the sample weights.
        floatx: dtype of floats and weights.
        structures: How the tensors of a role are nested, if neither a single tensor nor a dict by name.

    Raises:
        ColumnError: If a column is missing or cannot become the tensor.
        OptionError: If the specs or class weights do not fit together.
        UserCodeError: If the transform raises.
    """
    if source.x is None:
        raise OptionError('A source must name the columns of x; got none. Pass `x="column"`.')
    names, unavailable = source.needed_columns(), None
    if names is None:
        unavailable = _unavailable(opened)
        names = sorted(name for name in opened.fields if name not in unavailable)
    stored = tuple(opened.field(name) for name in names)
    for field in stored:
        _require_usable(field, source)
    batch_spec = BatchSpec(
        (), stored, dict(source.pad), tuple(source.ragged), dict(source.fill), source.transform, unavailable=unavailable
    )
    roles: tuple[tuple[Role, Spec], ...] = (
        ("x", source.x),
        ("y", source.y),
        ("sample_weight", source.sample_weight),
    )
    if source.transform is None:
        fields = {field.name: _decoded_field(field, source) for field in stored}
    else:
        fields = _probe(batch_spec, opened, {name for _, spec in roles for name in flat_names(spec)})
    tensors: list[ElementSpec] = []
    for role, spec in roles:
        for name, columns in _entries(role, spec):
            tensors.append(_tensor(role, name, columns, fields, source, floatx))
    batch_spec = dataclasses.replace(batch_spec, tensors=tuple(tensors), structures=structures or {})
    return with_class_weight(batch_spec, class_weight, floatx)


def check_weights(opened: OpenSource, batch_spec: BatchSpec) -> None:
    """Check that sample weights are finite, before a run starts.

    Weights that are large or come from a transform are checked when they are read for training.

    Raises:
        ColumnError: If a weight is not finite; names the column, the file and the row group.
    """
    tensors = tuple(_as_stored(t, opened) for t in batch_spec.role("sample_weight") if t.columns)
    names = {name for tensor in tensors for name in tensor.columns}
    stored = tuple(field for field in batch_spec.stored if field.name in names)
    if not tensors or batch_spec.transform or opened.num_rows * sum(f.row_nbytes for f in stored) > _CHECKED_NBYTES:
        return
    weights = dataclasses.replace(batch_spec, tensors=tensors, stored=stored)

    def check(file: int) -> None:
        reader = copy.copy(opened.reader)  # threads must not share open files
        for index in np.flatnonzero(opened.unit_file == file):
            unit = opened.unit(int(index))
            columns = reader.read(unit, 0, int(opened.unit_rows[index]), weights.columns)
            weights.assemble(weights.decode(columns, str(unit)), str(unit))

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        list(pool.map(check, np.unique(opened.unit_file)))


def _as_stored(weights: ElementSpec, opened: OpenSource) -> ElementSpec:
    """Return a tensor of weights as stored, without class weights."""
    if weights.class_column is None:
        return weights
    rank = len(opened.field(weights.columns[0]).shape)
    return dataclasses.replace(weights, class_weight=(), class_column=None, shape=weights.shape[:rank])


def _entries(role: Role, spec: Spec) -> list[tuple[str | None, tuple[str, ...] | str]]:
    if spec is None:
        return []
    if isinstance(spec, Mapping):
        if not spec:
            raise OptionError(f"`{role}` must name at least one column; got an empty dict.")
        return [(str(name), value if isinstance(value, str) else tuple(value)) for name, value in spec.items()]
    return [(None, spec if isinstance(spec, str) else tuple(spec))]


def _tensor(
    role: Role,
    name: str | None,
    columns: str | tuple[str, ...],
    fields: Mapping[str, Field],
    source: Source,
    floatx: str,
) -> ElementSpec:
    label = role if name is None else f"{role}[{name!r}]"
    names = (columns,) if isinstance(columns, str) else columns
    if not names:
        raise OptionError(f"`{label}` must name at least one column; got an empty list.")
    for column in names:
        if column not in fields:
            origin = "returned by `transform`" if source.transform else "in the source"
            raise ColumnError(
                f"Every column named by x, y or sample_weight must be {origin}; got {column!r} for {label}."
                f"{did_you_mean(column, fields)} Columns: {join_names(fields)}."
            )
    column_fields = [fields[column] for column in names]
    if isinstance(columns, str):
        (field,) = column_fields
        kind = {"list": "ragged", "string": "string", "dense": "dense"}[field.kind]
        dtype, shape = field.dtype, field.shape
    else:
        for field in column_fields:
            if field.kind != "dense" or field.shape:
                raise ColumnError(
                    f"Stacked columns must each have one number per row; {label} stacks {field.name!r}, which is "
                    f"{_described(field)}. Use it alone, or as a separate input."
                )
        kind, dtype, shape = "dense", np.result_type(*(f.dtype for f in column_fields)).name, (len(column_fields),)
    if kind == "string":
        dtype = "string"
    elif role == "sample_weight" or np.dtype(dtype).kind == "f":
        dtype = floatx
    if role == "sample_weight" and kind != "dense":
        raise ColumnError(
            f"Weights must be numbers; {label} names {names[0]!r}, which is {_described(column_fields[0])}."
        )
    return ElementSpec(role, name, names, kind, dtype, shape)  # type: ignore[arg-type]


def with_class_weight(batch_spec: BatchSpec, class_weight: ClassWeight | None, floatx: str) -> BatchSpec:
    """Multiply class weights into the sample weights; if any output is weighted, others get weights of 1.

    Args:
        batch_spec: The tensors without class weights.
        class_weight: Weights of classes, as the user passed them.
        floatx: dtype of weights.

    Raises:
        OptionError: If the weights do not fit the outputs.
    """
    outputs, weights = batch_spec.role("y"), {tensor.name: tensor for tensor in batch_spec.role("sample_weight")}
    names = [output.name for output in outputs]
    for name in weights:
        if name is not None and name not in names:
            raise OptionError(
                f"The keys of `sample_weight` must be outputs of y; got {name!r}."
                f"{did_you_mean(name, map(str, names))} Outputs: {join_names(names)}."
            )
    by_output = _class_weight_by_output(class_weight, names)
    if not by_output and (not weights or None in weights):
        return batch_spec.with_weights_like_y()
    output_weights = []
    for output in outputs:
        weight = weights.get(output.name) or weights.get(None)
        weight = weight or ElementSpec("sample_weight", output.name, (), "dense", floatx)
        if weighting := by_output.get(output.name):
            if output.kind != "dense" or len(output.columns) > 1:
                what = "contains text" if output.kind == "string" else "has none"
                raise OptionError(f"`class_weight` requires class labels in y; {output.label} {what}.")
            weight = dataclasses.replace(
                weight,
                dtype=floatx,
                shape=class_weighted_shape(weight.shape, output.shape),
                class_weight=weighting,
                class_column=output.columns[0] if output.columns else None,
            )
        output_weights.append(dataclasses.replace(weight, name=output.name))
    unweighted = tuple(tensor for tensor in batch_spec.tensors if tensor.role != "sample_weight")
    return dataclasses.replace(batch_spec, tensors=(*unweighted, *output_weights)).with_weights_like_y()


def _class_weight_by_output(
    class_weight: ClassWeight | None, names: Sequence[str | None]
) -> dict[str | None, tuple[tuple[int, float], ...]]:
    """Return the pairs of class and weight for each output that has class weights.

    Args:
        class_weight: As the user passed it.
        names: Names of the outputs; None for a single one. Outputs of a list are named by their index.
    """
    if not class_weight:
        return {}
    if not isinstance(class_weight, Mapping):
        raise OptionError(
            f"`class_weight` must be a dict of class to weight; got {class_weight!r:.200}. Write `{{0: 1.0, 1: 2.0}}`."
        )
    if not names:
        raise OptionError("`class_weight` requires y, which contains the classes; got a source without y.")
    if any(isinstance(value, Mapping) for value in class_weight.values()):
        by_name = {name if name in names else str(name): weights for name, weights in class_weight.items()}
        for name in by_name:
            if name not in names:
                raise OptionError(
                    f"The keys of a nested `class_weight` must be outputs of y; got {name!r}."
                    f"{did_you_mean(str(name), map(str, names))} Outputs: {join_names(names)}."
                )
        return {name: _weighting(weights) for name, weights in by_name.items()}
    if names != [None] and len(names) > 1:
        raise OptionError(
            "With several outputs, `class_weight` must name the output that it is for, such as "
            f"`class_weight={{{names[0]!r}: {dict(class_weight)!r}}}`."
        )
    return {names[0]: _weighting(class_weight)}


def _weighting(weights: Any) -> tuple[tuple[int, float], ...]:
    try:
        pairs = tuple((int(label), float(weight)) for label, weight in weights.items())
    except (AttributeError, TypeError, ValueError):
        raise OptionError(f"`class_weight` must map classes (ints) to weights (floats); got {weights!r}.") from None
    if not np.isfinite([weight for _, weight in pairs]).all():
        raise OptionError(f"`class_weight` must be finite; got {dict(pairs)!r}.")
    return pairs


def _unavailable(opened: OpenSource) -> dict[str, ValidationError]:
    """Return the error for each column that cannot be used; it is raised only if a transform requests the column."""
    errors = {name: _type_error(field) for name, field in opened.fields.items()}
    return {name: error for name, error in errors.items() if error is not None} | dict(opened.unusable)


def _type_error(field: Field) -> ColumnError | None:
    if not field.dtype.startswith("arrow:"):
        return None
    return ColumnError(
        f"A column must contain numbers, booleans, text, bytes, or lists of numbers; {field.name!r} is "
        f"{field.dtype.removeprefix('arrow:')}. Convert it when you write the data."
    )


def _require_usable(field: Field, source: Source) -> None:
    if (error := _type_error(field)) is not None:
        raise error
    for option, names in (("pad", source.pad), ("ragged", source.ragged)):
        if field.name in names and field.kind != "list":
            raise OptionError(f"`{option}` is for list columns; {field.name!r} is {_described(field)}.")


def _decoded_field(field: Field, source: Source) -> Field:
    """Return a column's field after `decode`."""
    if field.kind != "list" or field.name in source.ragged:
        return field
    if field.name in source.pad:
        option = source.pad[field.name]
        return Field(field.name, "dense", field.dtype, (option[0] if isinstance(option, tuple) else option,))
    if not field.shape:
        raise ColumnError(
            f"All rows of a tensor must have the same shape; column {field.name!r} has lists of unknown lengths. "
            f"Pass `pad={{{field.name!r}: length}}` or `ragged=[{field.name!r}]`."
        )
    return Field(field.name, "dense", field.dtype, field.shape)


def _probe(batch_spec: BatchSpec, opened: OpenSource, used: Collection[str]) -> dict[str, Field]:
    """Return the columns that the transform makes of the first rows; raise the error of a used column that failed."""
    where = str(opened.head_unit)
    columns = batch_spec.decode(opened.head(_PROBED_ROWS, batch_spec.columns), where)
    fields = {}
    for name, array in batch_spec.apply_transform(columns, (0,), where).items():
        if isinstance(array, ValidationError):
            if name in used:
                raise array
        elif isinstance(array, np.ndarray):
            if array.dtype.kind not in "biuf":
                raise ColumnError(f"`transform` must return numbers or text; {name!r} has dtype {array.dtype}.")
            fields[name] = Field(name, "dense", array.dtype.name, array.shape[1:])
        else:
            fields[name] = Field(name, "string", "bytes")
    return fields


def _described(field: Field) -> str:
    """Return a column's type for messages, such as `dense float32[28, 28]`."""
    return "text" if field.kind == "string" else f"{field.kind} {field.dtype}{list(field.shape) if field.shape else ''}"
