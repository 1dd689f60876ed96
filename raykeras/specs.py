"""What the specs of x, y and sample_weight ask for.

Enters: a source with its specs, its opened schema, class weights, the float type. Leaves: the
`Layout` of its batches, or an error that names the column. The transform is probed on the first rows.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from raykeras.columns import Layout, Role, Tensor, class_weighted_shape
from raykeras.errors import ColumnError, OptionError, ValidationError
from raykeras.sources import Field, OpenSource, Source, Spec, flat_names, listed, nearest
from raykeras.structures import Structure

ClassWeight = Mapping[Any, Any]
"""Class to weight; or that, by output name."""

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
) -> Layout:
    """The tensors that a source's specs ask for. Probes the transform on the first rows.

    Raises:
        ColumnError: If a column is missing or cannot be such a tensor.
        OptionError: If the specs or the class weights do not fit together.
        UserCodeError: If the transform fails.
    """
    if source.x is None:
        raise OptionError('A source must say what x is; got none. Give `x="column"`.')
    names, unavailable = source.needed_columns(), None
    if names is None:
        unavailable = _unavailable(opened)
        names = sorted(name for name in opened.fields if name not in unavailable)
    stored = tuple(opened.field(name) for name in names)
    for field in stored:
        _require_usable(field, source)
    layout = Layout(
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
        fields = _probe(layout, opened, {name for _, spec in roles for name in flat_names(spec)})
    tensors: list[Tensor] = []
    for role, spec in roles:
        for name, columns in _entries(role, spec):
            tensors.append(_tensor(role, name, columns, fields, source, floatx))
    tensors = _with_weights(tensors, class_weight, floatx)
    return dataclasses.replace(layout, tensors=tuple(tensors), structures=structures or {}).weighted_as_y()


def check_weights(opened: OpenSource, layout: Layout) -> None:
    """Reads the weights if they are few, so that one which is not finite stops a run before it starts.

    More of them, and what a transform makes, are checked where they are read for training.

    Raises:
        ColumnError: Names the file, the row group and the column.
    """
    tensors = tuple(_as_stored(t, opened) for t in layout.role("sample_weight") if t.columns)
    names = {name for tensor in tensors for name in tensor.columns}
    stored = tuple(field for field in layout.stored if field.name in names)
    if not tensors or layout.transform or opened.num_rows * sum(f.row_nbytes for f in stored) > _CHECKED_NBYTES:
        return
    weights = dataclasses.replace(layout, tensors=tensors, stored=stored)

    def check(file: int) -> None:
        reader = copy.copy(opened.reader)  # open files are not to be shared by threads
        for index in np.flatnonzero(opened.unit_file == file):
            unit = opened.unit(int(index))
            columns = reader.read(unit, 0, int(opened.unit_rows[index]), weights.columns)
            weights.assemble(weights.decode(columns, str(unit)), str(unit))

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        list(pool.map(check, np.unique(opened.unit_file)))


def _as_stored(weights: Tensor, opened: OpenSource) -> Tensor:
    """Return weights without the class weights that multiply them."""
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
        return [(str(name), part if isinstance(part, str) else tuple(part)) for name, part in spec.items()]
    return [(None, spec if isinstance(spec, str) else tuple(spec))]


def _tensor(
    role: Role,
    name: str | None,
    columns: str | tuple[str, ...],
    fields: Mapping[str, Field],
    source: Source,
    floatx: str,
) -> Tensor:
    label = role if name is None else f"{role}[{name!r}]"
    names = (columns,) if isinstance(columns, str) else columns
    if not names:
        raise OptionError(f"`{label}` must name at least one column; got an empty list.")
    for column in names:
        if column not in fields:
            made = "returned by `transform`" if source.transform else "in the source"
            raise ColumnError(
                f"Every column named by x, y or sample_weight must be {made}; got {column!r} for {label}."
                f"{nearest(column, fields)} Columns: {listed(fields)}."
            )
    found = [fields[column] for column in names]
    if isinstance(columns, str):
        (field,) = found
        kind = {"list": "ragged", "string": "string", "dense": "dense"}[field.kind]
        dtype, shape = field.dtype, field.shape
    else:
        for field in found:
            if field.kind != "dense" or field.shape:
                raise ColumnError(
                    f"Columns that are stacked must each be one number a row; {label} stacks {field.name!r}, "
                    f"which is {_described(field)}. Name it alone, or as an input of its own."
                )
        kind, dtype, shape = "dense", np.result_type(*(f.dtype for f in found)).name, (len(found),)
    if kind == "string":
        dtype = "string"
    elif role == "sample_weight" or np.dtype(dtype).kind == "f":
        dtype = floatx
    if role == "sample_weight" and kind != "dense":
        raise ColumnError(f"Weights must be numbers; {label} names {names[0]!r}, which is {_described(found[0])}.")
    return Tensor(role, name, names, kind, dtype, shape)  # type: ignore[arg-type]


def _with_weights(tensors: list[Tensor], class_weight: ClassWeight | None, floatx: str) -> list[Tensor]:
    """Adds class weights, and weights of one for outputs that have none where others do."""
    outputs = [t for t in tensors if t.role == "y"]
    weights = {t.name: t for t in tensors if t.role == "sample_weight"}
    names = [t.name for t in outputs]
    if None not in weights:
        for name in weights:
            if name not in names:
                raise OptionError(
                    f"`sample_weight` is given by the names of y's outputs; got {name!r}."
                    f"{nearest(str(name), [str(n) for n in names])} Outputs: {listed(names)}."
                )
    by_output = class_weight_by_output(class_weight, names)
    if not by_output and (not weights or None in weights):
        return tensors
    made = []
    for output in outputs:
        weight = weights.get(output.name) or weights.get(None)
        weight = weight or Tensor("sample_weight", output.name, (), "dense", floatx)
        if weighting := by_output.get(output.name):
            if output.kind != "dense" or len(output.columns) != 1:
                raise OptionError(f"`class_weight` needs y to hold classes; {output.label} does not.")
            weight = Tensor(
                "sample_weight",
                output.name,
                weight.columns,
                "dense",
                floatx,
                class_weighted_shape(weight.shape, output.shape),
                weighting,
                output.columns[0],
            )
        made.append(Tensor(**{**weight.__dict__, "name": output.name}))
    return [t for t in tensors if t.role != "sample_weight"] + made


def class_weight_by_output(
    class_weight: ClassWeight | None, names: Sequence[str | None]
) -> dict[str | None, tuple[tuple[int, float], ...]]:
    if not class_weight:
        return {}
    if not isinstance(class_weight, Mapping):
        raise OptionError(
            f"`class_weight` must be a dict of class to weight; got {class_weight!r:.200}. Write `{{0: 1.0, 1: 2.0}}`."
        )
    if not names:
        raise OptionError("`class_weight` needs y, which it looks its classes up in; the source has none.")
    if any(isinstance(value, Mapping) for value in class_weight.values()):
        for name in class_weight:
            if name not in names:
                raise OptionError(
                    f"`class_weight` of several outputs is given by their names; got {name!r}."
                    f"{nearest(str(name), map(str, names))} Outputs: {listed(names)}."
                )
        return {name: _weighting(weights) for name, weights in class_weight.items()}
    if names != [None] and len(names) > 1:
        raise OptionError(
            "With several outputs, `class_weight` must say which it is for: "
            f"`class_weight={{{names[0]!r}: {dict(class_weight)!r}}}`."
        )
    return {names[0]: _weighting(class_weight)}


def _weighting(weights: Any) -> tuple[tuple[int, float], ...]:
    try:
        pairs = tuple((int(label), float(weight)) for label, weight in weights.items())
    except (AttributeError, TypeError, ValueError):
        raise OptionError(f"`class_weight` maps classes (ints) to weights (floats); got {weights!r}.") from None
    if not np.isfinite([weight for _, weight in pairs]).all():
        raise OptionError(f"`class_weight` must be finite; got {dict(pairs)!r}.")
    return pairs


def _unavailable(opened: OpenSource) -> dict[str, ValidationError]:
    """Return the columns that a transform cannot have, each with the reason; an error only if it asks for one."""
    errors = {name: _type_error(field) for name, field in opened.fields.items()}
    return {name: error for name, error in errors.items() if error is not None} | dict(opened.unusable)


def _type_error(field: Field) -> ColumnError | None:
    if not field.dtype.startswith("arrow:"):
        return None
    return ColumnError(
        f"A column must hold numbers, booleans, text, bytes, or lists of numbers; {field.name!r} is "
        f"{field.dtype.removeprefix('arrow:')}. Convert it when you write the data."
    )


def _require_usable(field: Field, source: Source) -> None:
    if (error := _type_error(field)) is not None:
        raise error
    for option, names in (("pad", source.pad), ("ragged", source.ragged)):
        if field.name in names and field.kind != "list":
            raise OptionError(f"`{option}` is for columns of lists; {field.name!r} is {_described(field)}.")


def _decoded_field(field: Field, source: Source) -> Field:
    """What `decode` makes of a column."""
    if field.kind != "list" or field.name in source.ragged:
        return field
    if field.name in source.pad:
        wanted = source.pad[field.name]
        return Field(field.name, "dense", field.dtype, (wanted[0] if isinstance(wanted, tuple) else wanted,))
    if not field.shape:
        raise ColumnError(
            f"The rows of a tensor must have one shape; column {field.name!r} holds lists of unknown lengths. "
            f"Give `pad={{{field.name!r}: length}}` or `ragged=[{field.name!r}]`."
        )
    return Field(field.name, "dense", field.dtype, field.shape)


def _probe(layout: Layout, opened: OpenSource, used: Collection[str]) -> dict[str, Field]:
    """Return the columns that the transform makes of the first rows. Raises why one that is used cannot be had."""
    where = str(opened.head_unit)
    columns = layout.decode(opened.head(_PROBED_ROWS, layout.columns), where)
    fields = {}
    for name, array in layout.apply_transform(columns, (0,), where).items():
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
    return "text" if field.kind == "string" else f"{field.kind} {field.dtype}{list(field.shape) if field.shape else ''}"
