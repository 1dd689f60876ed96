"""The specification of a batch: which tensors it has, and how stored columns become them.

A `BatchSpec` is created by `raykeras.data.resolve` and works in any process. dtypes follow Keras: floats and sample
weights become `floatx`; everything else keeps its stored dtype.
"""

from __future__ import annotations

import dataclasses
import inspect
import socket
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raykeras.core.errors import ColumnError, UserCodeError, ValidationError
from raykeras.core.structures import Structure, filled, has_none
from raykeras.data.decode import decode, for_transform, from_transform
from raykeras.data.sources.base import Columns, Field, Transform, did_you_mean, join_names

Role = Literal["x", "y", "sample_weight"]


ROLES: tuple[Role, ...] = ("x", "y", "sample_weight")


_TILE_NBYTES, _MIN_TILE_ROWS = 512 << 10, 512


@dataclass(frozen=True)
class ElementSpec:
    """One tensor of a batch.

    Attributes:
        role: "x", "y" or "sample_weight".
        name: Input or output name; None if the role is a single tensor.
        columns: Source columns. Several are stacked to (rows, k); without any, all weights are 1.
        kind: "dense", "string" or "ragged".
        dtype: NumPy dtype name of the elements; "string" for text.
        shape: Shape of one row.
        class_weight: Pairs of class and weight; the tensor is multiplied by the weight of each row's class.
        class_column: Column that contains the class.
        num_classes: Labels must be in [0, num_classes); None if they are not checked.
    """

    role: Role
    name: str | None
    columns: tuple[str, ...]
    kind: Literal["dense", "string", "ragged"]
    dtype: str
    shape: tuple[Any, ...] = ()
    class_weight: tuple[tuple[int, float], ...] = ()
    class_column: str | None = None
    num_classes: int | None = None

    @property
    def label(self) -> str:
        """The tensor's name in messages, such as `y['score']`."""
        return self.role if self.name is None else f"{self.role}[{self.name!r}]"

    @property
    def row_nbytes(self) -> int:
        """The bytes of one row; an estimate for strings and ragged lists."""
        if self.kind != "dense":
            return 64
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class BatchSpec:
    """The tensors of a batch, in a fixed order, and how to make them from stored columns.

    Attributes:
        tensors: All tensors: x, then y, then sample_weight.
        stored: The columns to read.
        pad: For list columns, the length or `(length, value)`, by column.
        ragged: List columns that become ragged tensors.
        fill: Replacements for nulls, by column.
        transform: The user's function over decoded columns.
        structures: How the tensors of a role are nested, unless they are a single tensor or a dict by name.
        unavailable: If the transform takes all usable columns, the error for each unusable one; None if every
            column that is read must be usable.
        wraps_x: Whether x without y is passed as (x,), as in the user's batches.
    """

    tensors: tuple[ElementSpec, ...]
    stored: tuple[Field, ...]
    pad: Mapping[str, int | tuple[int, Any]]
    ragged: tuple[str, ...]
    fill: Mapping[str, Any]
    transform: Transform | None = None
    structures: Mapping[Role, Structure] = dataclasses.field(default_factory=dict)
    unavailable: Mapping[str, ValidationError] | None = None
    wraps_x: bool = False

    @property
    def columns(self) -> list[str]:
        """The names of the columns to read."""
        return [field.name for field in self.stored]

    @property
    def row_nbytes(self) -> int:
        """The bytes of one row of all tensors, at least 1."""
        return max(1, sum(tensor.row_nbytes for tensor in self.tensors))

    def role(self, role: Role) -> list[ElementSpec]:
        """Return the tensors of a role."""
        return [tensor for tensor in self.tensors if tensor.role == role]

    def is_sequence(self, role: Role) -> bool:
        """Return whether the tensors of a role are a list."""
        return isinstance(self.structures.get(role), tuple)

    @property
    def has_none(self) -> bool:
        """Whether x, y or sample_weight contain None."""
        roles = {tensor.role for tensor in self.tensors}
        return any(role in roles and has_none(self.structures[role]) for role in self.structures)

    def with_structure(self, role: Role, structure: Structure) -> BatchSpec:
        """Return a copy in which the tensors of a role are nested as given."""
        return dataclasses.replace(self, structures={**self.structures, role: structure})

    def with_weights_like_y(self) -> BatchSpec:
        """Return a copy in which the weights, one for each tensor of y, are nested like y."""
        return self.with_structure("sample_weight", self.structures["y"]) if "y" in self.structures else self

    def structure(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """Nest values in the order of `tensors` as (x,), (x, y) or (x, y, sample_weight)."""
        batch: list[Any] = []
        for role in ROLES:
            named = {t.name: value for t, value in zip(self.tensors, flat, strict=True) if t.role == role}
            if not named:
                batch.append(None)
            elif None in named:
                batch.append(named[None])
            elif role in self.structures:
                batch.append(filled(self.structures[role], named))
            else:
                batch.append(named)
        while batch[-1] is None:
            batch.pop()
        return tuple(batch)

    def element(self, flat: Sequence[Any]) -> Any:
        """Nest values as `train_step` receives them: like `structure`, but x without y is not wrapped in a tuple.

        A list or tuple x stays wrapped, since Keras would interpret it as (x, y).
        """
        batch = self.structure(flat)
        return batch if len(batch) > 1 or self.wraps_x or isinstance(batch[0], list | tuple) else batch[0]

    def decode(self, columns: Columns, where: str) -> Columns:
        """Turn stored columns into arrays; see `raykeras.data.decode`.

        If the transform takes all usable columns, a column that cannot be decoded is replaced by its error, which is
        raised only if the column is used.
        """
        decoded: Columns = {}
        for field in self.stored:
            column, ragged = columns[field.name], field.name in self.ragged
            try:
                if not isinstance(column, ColumnError):
                    column = decode(column, field, where=where, pad=self.pad, ragged=ragged, fill=self.fill)
            except ColumnError as error:
                if self.unavailable is None:
                    raise
                column = error.with_traceback(None)
            decoded[field.name] = column
        return decoded

    def apply_transform(self, columns: Columns, key: Sequence[int], where: str) -> Columns:
        """Call the transform, if there is one, with decoded columns.

        Args:
            columns: Decoded columns, or the errors in their place.
            key: Seed of the transform's generator.
            where: The file and row group, for messages.

        Returns:
            The transform's columns, and the errors of unavailable columns that it did not return.
        """
        if self.transform is None:
            return columns
        errors = dict(self.unavailable or {})
        errors |= {name: column for name, column in columns.items() if isinstance(column, ColumnError)}
        available = {name: column for name, column in columns.items() if name not in errors}
        if not available or (errors and self.unavailable is None):
            raise next(iter(errors.values()))
        return {**errors, **run_transform(self.transform, available, key, where, errors)}

    def assemble(self, columns: Columns, where: str) -> list[Any]:
        """Convert decoded and transformed columns to tensors, in the order of `tensors`."""
        num_rows = next((len(column) for column in columns.values() if not isinstance(column, ValidationError)), 0)
        return [_assemble(tensor, columns, num_rows, where) for tensor in self.tensors]

    def empty(self, num_rows: int) -> list[Any]:
        """Return uninitialized arrays for dense tensors, None for the others."""
        return [np.empty((num_rows, *t.shape), t.dtype) if t.kind == "dense" else None for t in self.tensors]

    def pack(self, tensors: Sequence[Any]) -> pa.Table:
        """Return the tensors as an Arrow table, which `unpack` reads without a copy."""
        names = [str(i) for i in range(len(tensors))]
        return pa.table([_pack(array) for array in tensors], names=names)

    def unpack(self, table: pa.Table) -> list[Any]:
        """Return the tensors of a table made by `pack`."""
        return [_unpack(t, table.column(i)) for i, t in enumerate(self.tensors)]


def slice_rows(column: Any, start: int, stop: int) -> Any:
    """Return rows of a decoded column; an error in its place is returned unchanged."""
    return column if isinstance(column, ColumnError) else column[start:stop]


def concatenate_column(name: str, parts: Sequence[Any]) -> Any:
    """Concatenate parts of a decoded column; return the error if one is an error or their shapes differ."""
    for part in parts:
        if isinstance(part, ColumnError):
            return part
    if not isinstance(parts[0], np.ndarray):
        return pa.concat_arrays(parts)
    shapes = sorted({part.shape[1:] for part in parts})
    if len(shapes) == 1:
        return np.concatenate(parts)
    return ColumnError(
        f"All rows of a tensor must have the same shape; column {name!r} has lists of {shapes[0][0]} and of "
        f"{shapes[-1][0]} values. Pass `pad={{{name!r}: length}}` or `ragged=[{name!r}]`."
    )


class _TransformInput(dict[str, Any]):
    """The columns passed to a transform; a missing one raises an error distinct from the user's own KeyErrors."""

    def __missing__(self, name: str) -> Any:
        raise _MissingColumn(name)


class _MissingColumn(KeyError):
    """A transform requested a column that it was not passed."""


def run_transform(
    transform: Transform, columns: Columns, key: Sequence[int], where: str, unavailable: Mapping[str, ValidationError]
) -> Columns:
    """Call the user's function.

    Args:
        transform: The function.
        columns: Decoded columns, all with the same number of rows.
        key: Seed of the function's generator.
        where: The file and row group, for messages.
        unavailable: The error for each column that cannot be used.

    Returns:
        The function's result as decoded columns.

    Raises:
        UserCodeError: If the function raises.
        ColumnError: If it requests a column that is unavailable, or returns something other than numbers or text with
            as many rows as it received.
    """
    arrays = _TransformInput({name: for_transform(array) for name, array in columns.items()})
    num_rows = len(next(iter(arrays.values())))
    name = getattr(transform, "__qualname__", transform)
    try:
        if wants_generator(transform):
            result = transform(arrays, np.random.Generator(np.random.PCG64(np.random.SeedSequence([2, *key]))))
        else:
            result = transform(arrays)
    except _MissingColumn as error:
        column = error.args[0]
        if column in unavailable:
            reason = f"which cannot be used: {unavailable[column]}"
        else:
            known = join_names(columns)
            reason = f"which is not among its columns.{did_you_mean(str(column), columns)} Columns: {known}."
        raise ColumnError(f"`transform` {name!r} requested column {column!r} in {where}, {reason}") from None
    except Exception as error:
        raise transform_error(transform, error, where) from error
    if not isinstance(result, Mapping):
        raise ColumnError(
            f"`transform` must return a dict of arrays; {name!r} returned {type(result).__name__} in {where}."
        )
    result = {column: _output_column(column, array, name, where) for column, array in result.items()}
    for column, array in result.items():
        if len(array) != num_rows:
            raise ColumnError(
                f"`transform` must return as many rows as it receives; {name!r} got {num_rows} and returned "
                f"{len(array)} for {column!r} in {where}."
            )
    return result


def _output_column(column: str, array: Any, name: Any, where: str) -> Any:
    try:
        return from_transform(array)
    except (pa.ArrowException, AttributeError, TypeError, ValueError) as error:
        raise ColumnError(
            f"`transform` must return arrays of numbers or text; {name!r} returned something else for {column!r} in "
            f"{where}: {str(error).splitlines()[0]}. Pad lists to the same length, or leave the column out."
        ) from None


def wants_generator(transform: Transform) -> bool:
    """Return whether a transform has a second positional parameter without a default."""
    try:
        parameters = inspect.signature(transform).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and positional[1].default is inspect.Parameter.empty


def transform_error(transform: Transform, error: Exception, where: str) -> UserCodeError:
    """Return the error for an exception of a transform, with only the user's frames."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    text = "".join(traceback.format_list(frames)) + "".join(traceback.format_exception_only(error))
    name = getattr(transform, "__qualname__", transform)
    return UserCodeError(
        f"`transform` {name!r} raised {type(error).__name__} in {where}: {error}",
        rank=None,
        node=socket.gethostname(),
        cause=type(error).__qualname__,
        user_traceback=text,
    )


def _shape_before_class_weights(tensor: ElementSpec, rank: int) -> tuple[Any, ...]:
    return tensor.shape if tensor.class_column is None else tensor.shape[:rank]


def class_weighted_shape(weights: tuple[Any, ...], y: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the shape of a row of weights multiplied by class weights.

    Class weights have all axes of y except the last, the axis of the classes.
    """
    return max(weights, y[:-1], key=len)


def class_weights(y: np.ndarray, class_weight: Sequence[tuple[int, float]]) -> np.ndarray:
    """Return the weight of each label's class, as Keras' `class_weight_to_sample_weights`.

    Args:
        y: Labels (rows, ...); the last axis, if there are several, holds one-hot classes or has size 1.
        class_weight: Pairs of class and weight; other classes weigh 1.

    Returns:
        float64 with the shape of y without its last axis; (rows,) if y has one axis.
    """
    if y.ndim > 1:
        y = np.argmax(y, -1) if y.shape[-1] != 1 else y[..., 0]
    y = np.round(y).astype(np.int64)
    result = np.ones(y.shape)
    for label, weight in class_weight:
        result[y == label] = weight
    return result


def _assemble(tensor: ElementSpec, columns: Columns, num_rows: int, where: str) -> Any:
    missing = [name for name in tensor.columns if name not in columns]
    if missing:
        raise ColumnError(
            f"`transform` must return the same columns for all rows; {missing[0]!r} is missing in {where}."
        )
    arrays = [columns[name] for name in tensor.columns]
    for array in arrays:
        if isinstance(array, ValidationError):
            raise array
    if tensor.kind != "dense":
        return arrays[0]
    if not arrays:
        result = np.ones(num_rows, tensor.dtype)
    elif len(arrays) == 1 and arrays[0].shape[1:] == _shape_before_class_weights(tensor, arrays[0].ndim - 1):
        result = arrays[0].astype(tensor.dtype, copy=False)
    elif tensor.shape == (len(arrays),):
        result = _stacked(arrays, num_rows, tensor.dtype)
    else:
        raise ColumnError(
            f"All rows of a tensor must have the same shape; {tensor.label} has shape {list(tensor.shape)} in the "
            f"first rows and {list(arrays[0].shape[1:])} in {where}."
        )
    if tensor.class_column is not None:
        factor = class_weights(columns[tensor.class_column], tensor.class_weight)
        rank = max(result.ndim, factor.ndim)
        factors = (array.reshape(array.shape + (1,) * (rank - array.ndim)) for array in (result, factor))
        result = np.multiply(*factors).astype(tensor.dtype)
    if tensor.num_classes is not None and num_rows:
        _check_labels(tensor, result, num_rows, where)
    if tensor.role == "sample_weight" and not np.isfinite(result).all():
        bad = int(np.flatnonzero(~np.isfinite(result.reshape(num_rows, -1)).all(1))[0])
        raise ColumnError(
            f"Weights must be finite; {' and '.join(map(repr, tensor.columns))} holds {result[bad]} at "
            f"{_row(bad, where)}. Fix the data, or set the weight of such rows to 0."
        )
    return result


def _check_labels(tensor: ElementSpec, labels: np.ndarray, num_rows: int, where: str) -> None:
    num_classes = tensor.num_classes or 0
    if labels.min() >= 0 and labels.max() < num_classes:
        return
    outside = ~((labels >= 0) & (labels < num_classes)).reshape(num_rows, -1).all(1)
    bad = int(np.flatnonzero(outside)[0])
    raise ColumnError(
        f"Labels of a sparse categorical crossentropy over {num_classes:,} classes must be between 0 and "
        f"{num_classes - 1:,}; {' and '.join(map(repr, tensor.columns))} holds {labels[bad]} at {_row(bad, where)}. "
        "Give the model's last layer one unit per class, or change the labels."
    )


def _row(number: int, where: str) -> str:
    if where.startswith("rows from "):  # a unit of arrays
        return f"row {int(where.removeprefix('rows from ')) + number}"
    return where if where.startswith("row ") else f"row {number} of {where}"


def _stacked(arrays: Sequence[np.ndarray], num_rows: int, dtype: str) -> np.ndarray:
    """Stack arrays (rows,) to a matrix (rows, k), in tiles that fit a core's cache unless they would be a few rows."""
    result = np.empty((num_rows, len(arrays)), dtype)
    size = _TILE_NBYTES // (result.itemsize * len(arrays))
    if size < _MIN_TILE_ROWS:
        for i, array in enumerate(arrays):
            result[:, i] = array
        return result
    for start in range(0, num_rows, size):
        tile = np.stack([array[start : start + size] for array in arrays], dtype=dtype, casting="unsafe")
        result[start : start + size] = tile.T
    return result


def _pack(array: Any) -> pa.Array:
    if not isinstance(array, np.ndarray):
        return array
    flat = np.ascontiguousarray(array).reshape(-1)
    values = pa.array(flat.view(np.uint8) if flat.dtype == np.bool_ else flat)
    return values if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, int(np.prod(array.shape[1:])))


def _unpack(tensor: ElementSpec, column: pa.ChunkedArray) -> Any:
    array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    if tensor.kind != "dense":
        return array
    rows = len(array)
    values = (array.flatten() if pa.types.is_fixed_size_list(array.type) else array).to_numpy()
    if tensor.dtype == "bool":
        values = values.view(np.bool_)
    return values.reshape(rows, *tensor.shape)
