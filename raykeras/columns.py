"""How stored columns become the tensors of a batch.

Enters: a source and its schema, class weights, the float type. Leaves: a `Layout`, the flat list of
tensors with role, name, dtype and shape, which turns the columns of some rows into those tensors in
any process, moves rows about, and packs them into an Arrow table and out again.

dtypes are Keras': floats become `floatx`, weights too, everything else stays as it is stored.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raykeras.decode import decode, for_transform, from_transform
from raykeras.errors import ColumnError, OptionError, UserCodeError
from raykeras.sources import Columns, Field, OpenSource, Source, Spec, Transform, nearest

Role = Literal["x", "y", "sample_weight"]
ClassWeight = Mapping[Any, Any]

_PROBED_ROWS = 8


@dataclass(frozen=True)
class Tensor:
    """One tensor of a batch.

    Attributes:
        role: "x", "y" or "sample_weight".
        name: Input or output name; None where the role is a single tensor.
        columns: What it is made of; several are stacked to (rows, k); none: weights of one.
        kind: "dense", "string" or "ragged".
        dtype: NumPy name of the elements' type; "string" for text.
        shape: Shape of one row.
        class_weight: Class to weight, multiplied in; `class_column` is the column that holds the class.
    """

    role: Role
    name: str | None
    columns: tuple[str, ...]
    kind: Literal["dense", "string", "ragged"]
    dtype: str
    shape: tuple[int, ...] = ()
    class_weight: tuple[tuple[int, float], ...] = ()
    class_column: str | None = None

    @property
    def label(self) -> str:
        return self.role if self.name is None else f"{self.role}[{self.name!r}]"

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row; a guess for strings and ragged lists."""
        if self.kind != "dense":
            return 64
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Layout:
    """The tensors of a batch, in a fixed order, and how to make them. Made by `resolve`.

    Attributes:
        tensors: All of them; x first, then y, then sample_weight.
        sequences: Roles whose tensors are handed on as a list instead of a dict.
        stored: The columns to read.
    """

    tensors: tuple[Tensor, ...]
    stored: tuple[Field, ...]
    pad: Mapping[str, int | tuple[int, Any]]
    ragged: tuple[str, ...]
    fill: Mapping[str, Any]
    transform: Transform | None = None
    sequences: tuple[Role, ...] = ()

    @property
    def columns(self) -> list[str]:
        return [field.name for field in self.stored]

    @property
    def row_nbytes(self) -> int:
        return max(1, sum(tensor.row_nbytes for tensor in self.tensors))

    def role(self, role: Role) -> list[Tensor]:
        return [tensor for tensor in self.tensors if tensor.role == role]

    def structure(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """Values in the order of `tensors` as Keras takes them: (x,), (x, y) or (x, y, sample_weight)."""
        batch: list[Any] = []
        for role in ("x", "y", "sample_weight"):
            named = [(t.name, value) for t, value in zip(self.tensors, flat, strict=True) if t.role == role]
            if not named:
                batch.append(None)
            elif role in self.sequences:
                batch.append(tuple(value for _, value in named))
            elif named[0][0] is None:
                batch.append(named[0][1])
            else:
                batch.append(dict(named))
        while batch[-1] is None:
            batch.pop()
        return tuple(batch)

    def decode(self, columns: Columns, where: str) -> Columns:
        """Stored columns as arrays; see `raykeras.decode`."""
        return {
            field.name: decode(
                columns[field.name],
                field,
                where=where,
                pad=self.pad,
                ragged=field.name in self.ragged,
                fill=self.fill,
            )
            for field in self.stored
        }

    def apply_transform(self, columns: Columns, key: Sequence[int]) -> Columns:
        """The user's function over decoded columns, its Generator seeded by `key`."""
        if self.transform is None:
            return columns
        return run_transform(self.transform, columns, key)

    def assemble(self, columns: Columns, where: str) -> list[Any]:
        """Decoded (and transformed) columns as tensors, in the order of `tensors`."""
        num_rows = len(next(iter(columns.values()))) if columns else 0
        return [_assemble(tensor, columns, num_rows, where) for tensor in self.tensors]

    def empty(self, num_rows: int) -> list[Any]:
        """Uninitialised arrays for dense tensors, None for the others."""
        return [np.empty((num_rows, *t.shape), t.dtype) if t.kind == "dense" else None for t in self.tensors]

    def pack(self, tensors: Sequence[Any]) -> pa.Table:
        """Tensors as an Arrow table that `unpack` reads without a copy."""
        names = [str(i) for i in range(len(tensors))]
        return pa.table([_pack(array) for array in tensors], names=names)

    def unpack(self, table: pa.Table) -> list[Any]:
        return [_unpack(t, table.column(i)) for i, t in enumerate(self.tensors)]


def resolve(
    source: Source,
    opened: OpenSource,
    *,
    class_weight: ClassWeight | None = None,
    floatx: str = "float32",
    sequences: Iterable[Role] = (),
) -> Layout:
    """The tensors that a source's specs ask for. Probes the transform on the first rows.

    Raises:
        ColumnError: If a column is missing or cannot be such a tensor.
        OptionError: If the specs or the class weights do not fit together.
        UserCodeError: If the transform fails.
    """
    if source.x is None:
        raise OptionError('A source must say what x is; got none. Give `x="column"`.')
    names = source.columns()
    if names is None:
        names = sorted(n for n, f in opened.fields.items() if not f.dtype.startswith("arrow:"))
    stored = tuple(opened.field(name) for name in names)
    for field in stored:
        _require_usable(field, source)
    layout = Layout((), stored, dict(source.pad), tuple(source.ragged), dict(source.fill), source.transform)
    if source.transform is None:
        fields = {field.name: _decoded_field(field, source) for field in stored}
    else:
        fields = _probe(layout, opened)
    tensors: list[Tensor] = []
    roles: tuple[tuple[Role, Spec], ...] = (
        ("x", source.x),
        ("y", source.y),
        ("sample_weight", source.sample_weight),
    )
    for role, spec in roles:
        for name, columns in _entries(role, spec):
            tensors.append(_tensor(role, name, columns, fields, source, floatx))
    tensors = _with_weights(tensors, class_weight, floatx)
    return Layout(tuple(tensors), stored, layout.pad, layout.ragged, layout.fill, source.transform, tuple(sequences))


def run_transform(transform: Transform, columns: Columns, key: Sequence[int]) -> Columns:
    """Calls the user's function; its result as decoded columns. Raises UserCodeError or ColumnError."""
    arrays = {name: for_transform(array) for name, array in columns.items()}
    num_rows = len(next(iter(arrays.values())))
    try:
        if wants_generator(transform):
            result = transform(arrays, np.random.Generator(np.random.PCG64(np.random.SeedSequence([2, *key]))))
        else:
            result = transform(arrays)
    except Exception as error:
        raise transform_error(transform, error) from error
    if not isinstance(result, Mapping):
        raise ColumnError(f"`transform` must return a dict of arrays; it returned {type(result).__name__}.")
    result = {name: from_transform(array) for name, array in result.items()}
    for name, array in result.items():
        if len(array) != num_rows:
            raise ColumnError(
                f"`transform` must return as many rows as it is given; got {num_rows} and returned {len(array)} "
                f"for {name!r}."
            )
    return result


def wants_generator(transform: Transform) -> bool:
    """Whether a transform has a second positional parameter without default."""
    try:
        parameters = inspect.signature(transform).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and positional[1].default is inspect.Parameter.empty


def transform_error(transform: Transform, error: Exception) -> UserCodeError:
    """An exception of a transform with the user's own traceback."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    text = "".join(traceback.format_list(frames)) + "".join(traceback.format_exception_only(error))
    return UserCodeError(
        f"`transform` {getattr(transform, '__qualname__', transform)!r} raised {type(error).__name__}: {error}",
        rank=None,
        node="",
        cause=type(error).__qualname__,
        user_traceback=text,
    )


def class_weights(y: np.ndarray, class_weight: Sequence[tuple[int, float]]) -> np.ndarray:
    """Weight of each row's class, 1 for classes that are not named: float64 (rows,).

    As `keras.utils.data_adapter_utils.class_weight_to_sample_weights`: one-hot rows by argmax.
    """
    if y.ndim > 1:
        y = np.argmax(y, -1) if y.shape[-1] != 1 else y[..., 0]
    y = np.round(y).astype(np.int64)
    result = np.ones(y.shape)
    for label, weight in class_weight:
        result[y == label] = weight
    return result


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
                f"{nearest(column, fields)} Columns: {', '.join(fields)}."
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
                    f"{nearest(str(name), [str(n) for n in names])} Outputs: {', '.join(map(str, names)) or 'none'}."
                )
    by_output = _class_weight_by_output(class_weight, names)
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
                weight.shape,
                weighting,
                output.columns[0],
            )
        made.append(Tensor(**{**weight.__dict__, "name": output.name}))
    return [t for t in tensors if t.role != "sample_weight"] + made


def _class_weight_by_output(
    class_weight: ClassWeight | None, names: Sequence[str | None]
) -> dict[str | None, tuple[tuple[int, float], ...]]:
    if not class_weight:
        return {}
    if not names:
        raise OptionError("`class_weight` needs y, which it looks its classes up in; the source has none.")
    if any(isinstance(value, Mapping) for value in class_weight.values()):
        for name in class_weight:
            if name not in names:
                raise OptionError(
                    f"`class_weight` of several outputs is given by their names; got {name!r}."
                    f"{nearest(str(name), map(str, names))} Outputs: {', '.join(map(str, names))}."
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


def _require_usable(field: Field, source: Source) -> None:
    if field.dtype.startswith("arrow:"):
        raise ColumnError(
            f"A column must hold numbers, booleans, text, bytes, or lists of numbers; {field.name!r} is "
            f"{field.dtype.removeprefix('arrow:')}. Convert it when you write the data."
        )
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


def _probe(layout: Layout, opened: OpenSource) -> dict[str, Field]:
    """The columns that the transform returns for the first rows."""
    columns = layout.decode(opened.head(_PROBED_ROWS, layout.columns), "the first rows")
    fields = {}
    for name, array in layout.apply_transform(columns, (0,)).items():
        if isinstance(array, np.ndarray):
            if array.dtype.kind not in "biuf":
                raise ColumnError(f"`transform` must return numbers or text; {name!r} has dtype {array.dtype}.")
            fields[name] = Field(name, "dense", array.dtype.name, array.shape[1:])
        else:
            fields[name] = Field(name, "string", "bytes")
    return fields


def _described(field: Field) -> str:
    return f"{field.kind} {field.dtype}{list(field.shape) if field.shape else ''}"


def _assemble(tensor: Tensor, columns: Columns, num_rows: int, where: str) -> Any:
    missing = [name for name in tensor.columns if name not in columns]
    if missing:
        raise ColumnError(
            f"`transform` must return the same columns for all rows; {missing[0]!r} is missing in {where}."
        )
    arrays = [columns[name] for name in tensor.columns]
    if tensor.kind != "dense":
        return arrays[0]
    if not arrays:
        result = np.ones(num_rows, tensor.dtype)
    elif len(arrays) == 1 and tensor.shape == arrays[0].shape[1:]:
        result = arrays[0].astype(tensor.dtype, copy=False)
    elif tensor.shape == (len(arrays),):
        result = np.empty((num_rows, len(arrays)), tensor.dtype)
        for i, array in enumerate(arrays):
            result[:, i] = array
    else:
        raise ColumnError(
            f"The rows of a tensor must have one shape; {tensor.label} is {list(tensor.shape)} in the first rows and "
            f"{list(arrays[0].shape[1:])} in {where}."
        )
    if tensor.class_column is not None:
        factor = class_weights(columns[tensor.class_column], tensor.class_weight)
        result = (result * factor.reshape(factor.shape + (1,) * (result.ndim - factor.ndim))).astype(tensor.dtype)
    if tensor.role == "sample_weight" and not np.isfinite(result).all():
        bad = int(np.flatnonzero(~np.isfinite(result.reshape(num_rows, -1)).all(1))[0])
        raise ColumnError(
            f"Weights must be finite; {' and '.join(map(repr, tensor.columns))} holds {result[bad]} at row {bad} of "
            f"{where}. Mend the data, or set such rows' weight to 0."
        )
    return result


def _pack(array: Any) -> pa.Array:
    if not isinstance(array, np.ndarray):
        return array
    flat = np.ascontiguousarray(array).reshape(-1)
    values = pa.array(flat.view(np.uint8) if flat.dtype == np.bool_ else flat)
    return values if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, int(np.prod(array.shape[1:])))


def _unpack(tensor: Tensor, column: pa.ChunkedArray) -> Any:
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    if tensor.kind != "dense":
        return array
    rows = len(array)
    values = (array.flatten() if pa.types.is_fixed_size_list(array.type) else array).to_numpy()
    if tensor.dtype == "bool":
        values = values.view(np.bool_)
    return values.reshape(rows, *tensor.shape)
