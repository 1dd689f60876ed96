"""How stored columns become the tensors of a batch.

Enters: the columns of some rows, as a reader gives them. Leaves: the same rows as tensors, in any
process: a `Layout` holds the flat list of tensors with role, name, dtype and shape, decodes and
assembles columns, and packs tensors into an Arrow table and out again. `raykeras.specs` makes it.

dtypes are Keras': floats become `floatx`, weights too, everything else stays as it is stored.
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

from raykeras.decode import decode, for_transform, from_transform
from raykeras.errors import ColumnError, UserCodeError, ValidationError
from raykeras.sources import Columns, Field, Transform, listed, nearest
from raykeras.structures import Structure, filled, has_none

Role = Literal["x", "y", "sample_weight"]
ROLES: tuple[Role, ...] = ("x", "y", "sample_weight")

_TILE_NBYTES, _MIN_TILE_ROWS = 512 << 10, 512


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
        num_classes: Of labels that must be from 0 to below it; None for anything else.
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
        structures: How the tensors of a role are nested, if they are neither one nor a dict of them by name.
        stored: The columns to read.
        unavailable: Where a transform gets all columns that can be used, the error for each of the others; None
            where every column that is read has to be one that can be used.
        wraps_x: Whether x alone comes as (x,), as in the user's own batches.
    """

    tensors: tuple[Tensor, ...]
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
        return [field.name for field in self.stored]

    @property
    def row_nbytes(self) -> int:
        return max(1, sum(tensor.row_nbytes for tensor in self.tensors))

    def role(self, role: Role) -> list[Tensor]:
        return [tensor for tensor in self.tensors if tensor.role == role]

    def is_sequence(self, role: Role) -> bool:
        """Return whether the tensors of a role are a list."""
        return isinstance(self.structures.get(role), tuple)

    @property
    def has_none(self) -> bool:
        """Whether the model gets None somewhere in x, y or sample_weight."""
        roles = {tensor.role for tensor in self.tensors}
        return any(role in roles and has_none(self.structures[role]) for role in self.structures)

    def with_structure(self, role: Role, structure: Structure) -> Layout:
        return dataclasses.replace(self, structures={**self.structures, role: structure})

    def weighted_as_y(self) -> Layout:
        """Return the layout with the weights, one for each tensor of y, nested as y."""
        return self.with_structure("sample_weight", self.structures["y"]) if "y" in self.structures else self

    def structure(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """Values in the order of `tensors` as (x,), (x, y) or (x, y, sample_weight)."""
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
        """Return the values as `train_step` gets them: as `structure`, but x alone as it is, unless it is a list."""
        parts = self.structure(flat)
        return parts if len(parts) > 1 or self.wraps_x or isinstance(parts[0], list | tuple) else parts[0]

    def decode(self, columns: Columns, where: str) -> Columns:
        """Turn stored columns into arrays; see `raykeras.decode`.

        An error takes the place of a column that cannot be decoded and that nobody may have asked for.
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
        """Call the user's function with decoded columns of `where`, its Generator seeded by `key`.

        An error stays in the place of a column that it could not have, and does not return.
        """
        if self.transform is None:
            return columns
        errors = dict(self.unavailable or {})
        errors |= {name: column for name, column in columns.items() if isinstance(column, ColumnError)}
        given = {name: column for name, column in columns.items() if name not in errors}
        if not given or (errors and self.unavailable is None):
            raise next(iter(errors.values()))
        return {**errors, **run_transform(self.transform, given, key, where, errors)}

    def assemble(self, columns: Columns, where: str) -> list[Any]:
        """Decoded (and transformed) columns as tensors, in the order of `tensors`."""
        num_rows = next((len(column) for column in columns.values() if not isinstance(column, ValidationError)), 0)
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


def cut(column: Any, start: int, stop: int) -> Any:
    """Return rows of a decoded column, or the error in its place."""
    return column if isinstance(column, ColumnError) else column[start:stop]


def joined(name: str, parts: Sequence[Any]) -> Any:
    """Join parts of a decoded column; return an error if there is one in their place, or they do not fit."""
    for part in parts:
        if isinstance(part, ColumnError):
            return part
    if not isinstance(parts[0], np.ndarray):
        return pa.concat_arrays(parts)
    shapes = sorted({part.shape[1:] for part in parts})
    if len(shapes) == 1:
        return np.concatenate(parts)
    return ColumnError(
        f"The rows of a tensor must have one shape; column {name!r} has lists of {shapes[0][0]} values and of "
        f"{shapes[-1][0]}. Give `pad={{{name!r}: length}}` or `ragged=[{name!r}]`."
    )


class _Given(dict[str, Any]):
    """What a transform gets; asked for another column, it raises an error that is told from the user's own."""

    def __missing__(self, name: str) -> Any:
        raise _NotGiven(name)


class _NotGiven(KeyError):
    """A column that a transform asked for and does not get."""


def run_transform(
    transform: Transform, columns: Columns, key: Sequence[int], where: str, unavailable: Mapping[str, ValidationError]
) -> Columns:
    """Call the user's function.

    Args:
        transform: The function.
        columns: Decoded columns of some rows.
        key: Seeds its Generator.
        where: The file and row group, for messages.
        unavailable: Columns that it cannot have, and why.

    Returns:
        Its result as decoded columns.

    Raises:
        UserCodeError: If it raises.
        ColumnError: If it asks for a column that it cannot have, or its result has another number of rows.
    """
    arrays = _Given({name: for_transform(array) for name, array in columns.items()})
    num_rows = len(next(iter(arrays.values())))
    name = getattr(transform, "__qualname__", transform)
    try:
        if wants_generator(transform):
            result = transform(arrays, np.random.Generator(np.random.PCG64(np.random.SeedSequence([2, *key]))))
        else:
            result = transform(arrays)
    except _NotGiven as error:
        wanted = error.args[0]
        if wanted in unavailable:
            reason = f"which it cannot have: {unavailable[wanted]}"
        else:
            known = listed(columns)
            reason = f"which is not among its columns.{nearest(str(wanted), columns)} Columns: {known}."
        raise ColumnError(f"`transform` {name!r} asked for column {wanted!r} in {where}, {reason}") from None
    except Exception as error:
        raise transform_error(transform, error, where) from error
    if not isinstance(result, Mapping):
        raise ColumnError(
            f"`transform` must return a dict of arrays; {name!r} returned {type(result).__name__} in {where}."
        )
    result = {column: _returned(column, array, name, where) for column, array in result.items()}
    for column, array in result.items():
        if len(array) != num_rows:
            raise ColumnError(
                f"`transform` must return as many rows as it is given; {name!r} got {num_rows} and returned "
                f"{len(array)} for {column!r} in {where}."
            )
    return result


def _returned(column: str, array: Any, name: Any, where: str) -> Any:
    try:
        return from_transform(array)
    except (pa.ArrowException, AttributeError, TypeError, ValueError) as error:
        raise ColumnError(
            f"`transform` must return arrays of numbers or of text; {name!r} returned something else for {column!r} in "
            f"{where}: {str(error).splitlines()[0]}. Give lists one length, or leave the column out."
        ) from None


def wants_generator(transform: Transform) -> bool:
    """Whether a transform has a second positional parameter without default."""
    try:
        parameters = inspect.signature(transform).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and positional[1].default is inspect.Parameter.empty


def transform_error(transform: Transform, error: Exception, where: str) -> UserCodeError:
    """An exception of a transform with the user's own traceback."""
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


def _shape_before_class_weights(tensor: Tensor, rank: int) -> tuple[Any, ...]:
    return tensor.shape if tensor.class_column is None else tensor.shape[:rank]


def class_weighted_shape(weights: tuple[Any, ...], y: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the shape of a row of weights times class weights, which have all axes of y but that of the classes."""
    return max(weights, y[:-1], key=len)


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


def _assemble(tensor: Tensor, columns: Columns, num_rows: int, where: str) -> Any:
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
            f"The rows of a tensor must have one shape; {tensor.label} is {list(tensor.shape)} in the first rows and "
            f"{list(arrays[0].shape[1:])} in {where}."
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
            f"{_row(bad, where)}. Mend the data, or set such rows' weight to 0."
        )
    return result


def _check_labels(tensor: Tensor, labels: np.ndarray, num_rows: int, where: str) -> None:
    num_classes = tensor.num_classes or 0
    if labels.min() >= 0 and labels.max() < num_classes:
        return
    outside = ~((labels >= 0) & (labels < num_classes)).reshape(num_rows, -1).all(1)
    bad = int(np.flatnonzero(outside)[0])
    raise ColumnError(
        f"Labels of a sparse categorical crossentropy over {num_classes:,} classes must be from 0 to "
        f"{num_classes - 1:,}; {' and '.join(map(repr, tensor.columns))} holds {labels[bad]} at {_row(bad, where)}. "
        "Give the model's last layer a unit for each class, or change the labels."
    )


def _row(number: int, where: str) -> str:
    if where.startswith("rows from "):  # of arrays
        return f"row {int(where.removeprefix('rows from ')) + number}"
    return where if where.startswith("row ") else f"row {number} of {where}"


def _stacked(arrays: Sequence[np.ndarray], num_rows: int, dtype: str) -> np.ndarray:
    """Arrays (rows,) as the columns of a matrix.

    By tiles that stay in a core's cache: writing whole columns, each value to a cache line of its own, takes two to
    four times as long; but not where there are so many columns that a tile is a few rows.
    """
    result = np.empty((num_rows, len(arrays)), dtype)
    size = _TILE_NBYTES // (result.itemsize * len(arrays))
    if size < _MIN_TILE_ROWS:
        for i, array in enumerate(arrays):
            result[:, i] = array
        return result
    for a in range(0, num_rows, size):
        tile = np.stack([array[a : a + size] for array in arrays], dtype=dtype, casting="unsafe")
        result[a : a + size] = tile.T
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
