"""NumPy sources: arrays in memory, `.npz` archives, and memory-mapped `.npy` files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raykeras.core.errors import ColumnError, OptionError, SourceError
from raykeras.core.structures import is_nested, leaves, name_of
from raykeras.data.sources.base import (
    Cache,
    Columns,
    Field,
    OpenSource,
    Source,
    Spec,
    Transform,
    UnitRef,
    did_you_mean,
    fingerprint,
    flat_names,
    join_names,
)

_UNIT_NBYTES = 4 << 20


class ArrayReader:
    """Reads arrays in memory; after `share`, other processes read them from Ray's object store."""

    in_memory = True

    def __init__(self, arrays: Columns | None) -> None:
        self._arrays = arrays
        self._ref: Any = None

    @property
    def arrays(self) -> Columns:
        """The arrays, by column name."""
        if self._arrays is None:
            import ray

            self._arrays = ray.get(self._ref)  # read-only views of shared memory
        return self._arrays

    def share(self) -> None:
        """Put the arrays into the object store, unless they are there, so that pickling copies only a reference."""
        import ray

        if self._ref is None:
            # Ray shares only contiguous arrays; of any other, each worker would get a copy.
            self._ref = ray.put({name: _contiguous(array) for name, array in self.arrays.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {"_arrays": None if self._ref is not None else self._arrays, "_ref": self._ref}

    def read(self, unit: UnitRef, start: int, stop: int, columns: Sequence[str]) -> Columns:
        rows = slice(unit.start + start, unit.start + stop)
        return {name: self.arrays[name][rows] for name in columns}


class NpyReader:
    """Reads ranges of `.npy` files; remote files are downloaded, and all are memory-mapped."""

    in_memory = False

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._paths = dict(paths)

    def read(self, unit: UnitRef, start: int, stop: int, columns: Sequence[str]) -> Columns:
        rows = slice(unit.start + start, unit.start + stop)
        return {name: np.array(open_npy(self._paths[name])[rows]) for name in columns}


@dataclass(frozen=True, kw_only=True, repr=False)
class ArraySource(Source):
    """Arrays in memory, by column name."""

    arrays: Columns = field(repr=False)

    def open(self) -> OpenSource:
        return _open(ArrayReader(self.arrays), self.arrays, {name: "" for name in self.arrays})


@dataclass(frozen=True, kw_only=True, repr=False)
class NpySource(Source):
    """`.npy` files, by column name, or one `.npz` archive, whose keys are the columns."""

    paths: Mapping[str, str]
    archive: str | None = None

    def open(self) -> OpenSource:
        if self.archive is not None:
            keys = flat_names([*_specs(self)]) if self.columns is None else self.columns
            arrays = _open_npz(self.archive, keys, self.transform is not None and self.columns is None)
            return _open(ArrayReader(arrays), arrays, {name: self.archive for name in arrays})
        arrays = {name: open_npy(path) for name, path in self.paths.items()}
        return _open(NpyReader(self.paths), arrays, dict(self.paths))


def npy(
    path: str | os.PathLike[str] | Mapping[str, str],
    y: Spec = None,
    *,
    x: Spec = None,
    sample_weight: Spec = None,
    transform: Transform | None = None,
    columns: Sequence[str] | None = None,
    cache: Cache = "auto",
) -> NpySource:
    """Return a source that reads NumPy files.

    Args:
        path: The `.npy` file of x, or of each input by name; or a `.npz` archive.
        y: The `.npy` file of y, or of each output by name; with an archive, its key.
        x: With an archive, the key of x, or of each input by name.
        sample_weight: Like `y`.
        transform: `f(columns)` or `f(columns, rng)`, called on windows of rows inside the read tasks; see `Source`.
        columns: With an archive and a transform, the keys of the arrays passed to the transform.
        cache: "memory", None or "auto"; see `Source`.

    Returns:
        A source. `.npy` files are memory-mapped, an archive is loaded into memory.

    Raises:
        OptionError: If a path does not end with `.npy` or `.npz`, or the options do not fit the kind of file.
    """
    if not isinstance(path, Mapping) and str(path).endswith(".npz"):
        if x is None:
            raise OptionError(f'An archive needs the key of x; got {str(path)!r} without `x`. Try `x="x_train"`.')
        return NpySource(
            paths={},
            archive=_absolute(str(path)),
            x=x,
            y=y,
            sample_weight=sample_weight,
            transform=transform,
            columns=columns,
            cache=cache,
        )
    if x is not None:
        raise OptionError("`x` names a key of a .npz archive; with .npy files, the first argument is x itself.")
    if columns is not None:
        raise OptionError("`columns` names keys of a .npz archive; with .npy files, `transform` receives all of them.")
    paths: dict[str, str] = {}
    specs = {
        role: _name_files(role, value, paths)
        for role, value in [("x", path), ("y", y), ("sample_weight", sample_weight)]
    }
    return NpySource(paths=paths, transform=transform, cache=cache, **specs)  # type: ignore[arg-type]


def from_arrays(x: Any, y: Any = None, sample_weight: Any = None, **options: Any) -> ArraySource:
    """Return a source of arrays, in the forms that `Model.fit` accepts.

    Args:
        x: An array, an eager tensor, or a pandas DataFrame or Series, rows first; a dict of them by input name; a list
            in the order of the inputs; or these nested, see `raykeras.core.structures`.
        y: Likewise, by output.
        sample_weight: Likewise, by output.
        **options: Options of `Source`.

    Raises:
        OptionError: If there is no array, or one is sparse or ragged.
    """
    arrays: Columns = {}
    specs = {
        role: _name_arrays(role, value, arrays)
        for role, value in [("x", x), ("y", y), ("sample_weight", sample_weight)]
    }
    return ArraySource(arrays=arrays, **specs, **options)  # type: ignore[arg-type]


def open_npy(path: str) -> np.ndarray:
    """Memory-map a `.npy` file; a remote file is first downloaded to fsspec's cache.

    Raises:
        SourceError: If the file does not exist or is not a `.npy` file without objects.
    """
    if "://" in path:
        import fsspec

        local = fsspec.open_local(f"simplecache::{path}")
        path = local if isinstance(local, str) else local[0]
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise SourceError(f"The files of a source must exist; there is no {path!r}.") from None
    except (OSError, ValueError) as error:
        raise SourceError(
            f"A .npy file must contain one array without Python objects; {path!r} cannot be loaded: {error}"
        ) from None


def _contiguous(array: Any) -> Any:
    return array.copy() if isinstance(array, np.ndarray) and not array.flags.forc else array


def _specs(source: Source) -> list[Any]:
    return [spec for spec in (source.x, source.y, source.sample_weight) if spec is not None]


def _open_npz(path: str, keys: Sequence[str], may_be_transformed: bool) -> Columns:
    """Load the arrays of an archive.

    Args:
        path: The archive.
        keys: The arrays to load; all, if there are none.
        may_be_transformed: Whether keys that are not in the archive are left out, since a transform may return them.
    """
    import fsspec

    try:
        with fsspec.open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            if may_be_transformed:
                keys = [key for key in keys if key in archive.files]
            for key in keys:
                if key not in archive.files:
                    raise ColumnError(
                        f"Keys must exist in the archive; got {key!r}."
                        f"{did_you_mean(key, archive.files)} Keys of {path!r}: {join_names(archive.files)}."
                    )
            return {key: archive[key] for key in keys or archive.files}
    except FileNotFoundError:
        raise SourceError(f"The files of a source must exist; there is no {path!r}.") from None
    except ColumnError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise SourceError(
            f"A .npz archive must be complete and contain no Python objects; {path!r} cannot be loaded: {error}"
        ) from None


def _open(reader: Any, arrays: Columns, origin: Mapping[str, str]) -> OpenSource:
    fields = {}
    for name, array in arrays.items():
        if array.ndim == 0:
            raise ColumnError(f"The first axis of an array must be its rows; {_label(name, origin)} is a scalar.")
        if array.dtype.kind in "OSU":
            fields[name] = Field(name, "string", "string", array.shape[1:])
        elif array.dtype.kind in "biuf":
            fields[name] = Field(name, "dense", array.dtype.name, array.shape[1:])
        else:
            raise ColumnError(
                f"An array must contain numbers, booleans or text; {_label(name, origin)} contains {array.dtype}."
            )
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{_label(name, origin)} has {n:,}" for name, n in lengths.items())
        raise ColumnError(f"x, y and sample_weight must have the same number of rows; {counts}.")
    num_rows = next(iter(lengths.values()))
    if num_rows == 0:
        raise ColumnError(
            "Expected input data to be non-empty. A source must have at least one row; got arrays without rows."
        )
    rows = max(1, _UNIT_NBYTES // max(1, sum(f.row_nbytes for f in fields.values())))
    starts = np.arange(0, num_rows, rows, dtype=np.int64)
    zeros = np.zeros(len(starts), np.int64)
    parts = {f"array {n!r}": fingerprint([str(a.dtype), a.shape, _sample_digest(a)]) for n, a in arrays.items()}
    return OpenSource(
        reader,
        fields,
        (next(iter(origin.values())),),
        zeros,
        zeros,
        starts,
        np.diff(starts, append=num_rows),
        fingerprint(parts),
        fingerprint_parts=parts,
    )


def _sample_digest(array: np.ndarray) -> str:
    """Return a digest of about 64 of the rows, to tell arrays of the same shape apart without reading all rows."""
    rows = array[:: max(1, len(array) // 64)]
    return fingerprint(rows.tolist() if array.dtype.kind in "OSU" else np.ascontiguousarray(rows).tobytes().hex())


def _label(name: str, origin: Mapping[str, str]) -> str:
    return f"{name} ({origin[name]})" if origin.get(name) else name


def _name_files(role: str, value: Any, paths: dict[str, str]) -> Spec:
    """Add the files of a role to `paths`, under names that are columns, and return its column spec."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: _name_files(f"{role}.{key}", path, paths) for key, path in value.items()}  # type: ignore[misc]
    if not str(value).endswith(".npy"):
        raise OptionError(f"`npy` reads .npy files and .npz archives; got {str(value)!r} for {role}.")
    paths[role] = _absolute(str(value))
    return role


def _name_arrays(role: str, value: Any, arrays: Columns) -> Spec:
    """Add the arrays of a role to `arrays`, under names that are columns, and return its column spec."""
    if value is None:
        return None
    spec: dict[str, str] = {}
    for path, leaf in leaves(value):
        if type(leaf).__name__ in ("RaggedTensor", "SparseTensor") or hasattr(leaf, "todense"):
            raise OptionError(
                f"{role} must be dense; got a {type(leaf).__name__}. Convert it to a dense array, pass a generator of "
                "batches, or read lists of different lengths with `rk.parquet(..., ragged=[...])`."
            )
        array = np.asarray(leaf)
        if array.dtype.name == "bfloat16":  # no NumPy dtype
            array = array.astype(np.float32)
        is_series = array.ndim == 1 and role != "sample_weight" and hasattr(leaf, "iloc")
        label = role + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
        arrays[label] = array[:, None] if is_series else array  # as in Keras, a pandas Series is (rows, 1)
        spec[name_of(path) or ""] = label
    if not spec:
        raise OptionError(
            f"{role} must contain at least one array; got {value!r:.200}. Pass one for each input that is not optional."
        )
    return spec if is_nested(value) else role


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)
