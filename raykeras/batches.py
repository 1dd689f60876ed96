"""Batches that the user makes: `tf.data.Dataset`, `PyDataset` or `Sequence`, torch `DataLoader`, generator.

Enters: what was passed as x. Leaves: what is known of it before the first batch is used, and how any batch
of it becomes arrays in the order of the layout. `raykeras.epochs` iterates them.

    dataset     iterated anew each pass
    sequence    in an order of its own for each (seed, pass) if shuffled; its hooks are called each epoch
    loader      iterated anew each pass
    generator   iterated once
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from raykeras.columns import ROLES, Layout, Role, Tensor
from raykeras.errors import OptionError, RaykerasError, user_code_error
from raykeras.structures import leaves, name_of, structure_of

Kind = Literal["dataset", "sequence", "loader", "generator"]
Flat = list[np.ndarray]
"""A batch as arrays in the order of the layout's tensors."""

_SAMPLE_ROWS = 8


@dataclass(frozen=True)
class Batches:
    """Batches as the user makes them.

    Attributes:
        data: What was passed; None where only its batches arrive.
        kind: What it is.
        num_batches: In a pass; None where it is not known, or where a pass has no end.
        layout: Of a batch; unknown dimensions of a row are None.
        is_infinite: Whether a pass has no end.
        taken: Batches that were taken from a generator to learn its layout, and come first.
        sample: A few rows, where they could be had without iterating.
        batch_s, batch_nbytes: Seconds that it took to make a batch, and its size, where that is known.
    """

    data: Any
    kind: Kind
    num_batches: int | None
    layout: Layout
    is_infinite: bool = False
    taken: tuple[Any, ...] = ()
    sample: tuple[np.ndarray, ...] = ()
    batch_s: float = 0.0
    batch_nbytes: int = 0

    @property
    def described(self) -> str:
        return {"dataset": "tf.data.Dataset", "loader": "DataLoader"}.get(self.kind, self.kind)

    def without_data(self) -> Batches:
        """What is known of them, to be pickled."""
        return replace(self, data=None, taken=())

    def of_x(self) -> Batches:
        """The same, of which only x is used."""
        num_tensors = len(self.layout.role("x"))
        layout = replace(self.layout, tensors=self.layout.tensors[:num_tensors])
        return replace(self, layout=layout, sample=self.sample[:num_tensors])

    def flat(self, batch: Any, number: int, *, copy: bool = False) -> Flat:
        """A batch as arrays of the layout's dtypes and numbers of dimensions.

        Raises:
            OptionError: If it is not such a batch.
        """
        parts, arrays = parts_of(batch), []
        for tensor in self.layout.tensors:
            value = parts.get((tensor.role, tensor.name))
            if value is None:
                raise OptionError(f"All batches must be alike; batch {number} has no {tensor.label}.")
            array = as_array(value)
            if array.ndim != 1 + len(tensor.shape):
                raise other_shape(tensor, array.shape[1:], number)
            arrays.append(array.astype(_numpy_dtype(tensor), copy=copy))
        rows = [len(array) for array in arrays]
        if min(rows) != max(rows) or not rows[0]:
            named = ", ".join(f"{t.label} {n}" for t, n in zip(self.layout.tensors, rows, strict=True))
            raise OptionError(f"All parts of a batch must have the same rows, one at least; batch {number}: {named}.")
        return arrays


def as_batches(data: Any, floatx: str) -> Batches | None:
    """What was passed as x, if it makes batches itself; else None.

    Raises:
        OptionError: If they cannot be used.
        UserCodeError: If the user's own code fails with the first batches.
    """
    if _is(data, "tensorflow.python.", "DatasetV2"):
        return _of_dataset(data)
    if _is(data, "tensorflow.python.", "DistributedDataset", "DistributedDatasetsFromFunction"):
        raise OptionError(
            "A dataset must not be distributed yet, since the workers are given their parts of it here; got a "
            f"{type(data).__name__}. Give the tf.data.Dataset itself."
        )
    if _is(data, "keras.", "PyDataset", "Sequence") or _is(data, "tf_keras.", "Sequence"):
        return _guarded(lambda: _of_sequence(data, floatx))
    if _is(data, "torch.utils.data", "DataLoader"):
        return _guarded(lambda: _of_loader(data, floatx))
    if isinstance(data, Iterator):
        wraps_x = False

        def first() -> Iterator[Any]:
            nonlocal wraps_x
            for batch in itertools.islice(data, 2):
                wraps_x = isinstance(batch, tuple)
                yield _copied(as_tuple(batch))  # before the next one, which may be made in the same arrays

        taken = _guarded(lambda: tuple(first()))
        layout = _layout_of(taken, "generator", floatx, wraps_x)
        return _known(Batches(data, "generator", None, layout, taken=taken), taken)
    return None


def _of_dataset(data: Any) -> Batches:
    cardinality = int(data.cardinality())
    if cardinality == 0:
        raise OptionError("A tf.data.Dataset must have at least one batch; this one is empty.")
    sizes = set()

    def spec(part: Any) -> tuple[str, tuple[int | None, ...]]:
        if type(part).__name__ != "TensorSpec":
            raise OptionError(
                f"The batches of a tf.data.Dataset must hold dense tensors; got {part}. Make them dense in "
                "`Dataset.map`, as by `tensor.to_tensor()`."
            )
        if part.shape.rank is None:
            raise OptionError(
                f"A tf.data.Dataset must know the rank of its tensors; got {part}. Say it in `Dataset.map`, by "
                "`tf.ensure_shape(tensor, [None, ...])`."
            )
        sizes.add(part.shape[0] if part.shape.rank else "a single number")
        return part.dtype.name, tuple(part.shape)[1:]

    layout = _layout(as_tuple(data.element_spec), spec, "tf.data.Dataset", wraps_x=isinstance(data.element_spec, tuple))
    if "a single number" in sizes or len(sizes - {None}) > 1:
        raise OptionError(
            f"The elements of a tf.data.Dataset must be batches, rows first; got {data.element_spec}. Call "
            "`dataset.batch(...)`."
        )
    return Batches(data, "dataset", cardinality if cardinality > 0 else None, layout, cardinality == -1)


def _of_sequence(data: Any, floatx: str) -> Batches:
    try:
        length = data.num_batches if hasattr(type(data), "num_batches") else len(data)
    except NotImplementedError:
        length = None  # as PyDataset.__iter__ takes it
    if length is not None and length < 1:
        raise OptionError("A Sequence must have at least one batch; this one has none.")
    known, batch_s = [], []
    for index in (0, 1 if length is None else length - 1):
        since = time.perf_counter()
        known.append(data[index])
        batch_s.append(time.perf_counter() - since)
    layout = _layout_of(known, "Sequence", floatx, wraps_x=not _is(data, "tf_keras.", "Sequence"))
    batches = Batches(data, "sequence", length and int(length), layout, length is None, batch_s=min(batch_s))
    return _known(batches, known)


def _of_loader(data: Any, floatx: str) -> Batches:
    try:
        length = len(data)
    except TypeError:  # of an IterableDataset
        length = None
    known = list(itertools.islice(data, 2))
    return _known(Batches(data, "loader", length, _layout_of(known, "DataLoader", floatx, wraps_x=True)), known)


def _known(batches: Batches, known: Sequence[Any]) -> Batches:
    """With a few rows of the batches that are known."""
    first, *_ = (batches.flat(batch, number) for number, batch in enumerate(known))
    sample = tuple(array[:_SAMPLE_ROWS].copy() for array in first)
    return replace(batches, sample=sample, batch_nbytes=sum(array.nbytes for array in first))


def _layout_of(batches: Sequence[Any], what: str, floatx: str, wraps_x: bool) -> Layout:
    """The layout of batches of arrays; where their rows' shapes differ, a dimension is unknown."""
    if not batches:
        raise OptionError(f"A {what} must have at least one batch; this one has none.")

    def spec(value: Any) -> tuple[str, tuple[int | None, ...]]:
        array = as_array(value)
        if not array.ndim:
            raise OptionError(f"The parts of a batch must be arrays, rows first; a {what} gave {value!r}.")
        if array.dtype.kind == "O" and not all(isinstance(item, str | bytes) for item in array.flat):
            raise OptionError(
                f"The arrays of a batch must hold numbers or text; a {what} gave one of objects, {array.flat[0]!r} "
                "among them. Rows of differing lengths must be padded."
            )
        text = array.dtype.kind in "OSU"
        return "string" if text else floatx if array.dtype.kind == "f" else array.dtype.name, array.shape[1:]

    first, *others = (_layout(as_tuple(batch), spec, what, wraps_x) for batch in batches)
    tensors = list(first.tensors)
    for other in others:
        for i, (a, b) in enumerate(itertools.zip_longest(tensors, other.tensors)):
            if a is None or b is None or a.label != b.label or len(a.shape) != len(b.shape):
                raise OptionError(
                    f"All batches must be alike; of a {what} one is {_listed(first)}, and another {_listed(other)}."
                )
            tensors[i] = replace(a, shape=tuple(m if m == n else None for m, n in zip(a.shape, b.shape, strict=True)))
    return replace(first, tensors=tuple(tensors))


def _layout(
    batch: tuple[Any, ...], spec: Callable[[Any], tuple[str, tuple[int | None, ...]]], what: str, wraps_x: bool
) -> Layout:
    tensors: list[Tensor] = []
    for (role, name), value in parts_of(batch).items():
        dtype, shape = spec(value)
        tensors.append(Tensor(role, name, (), "string" if dtype == "string" else "dense", dtype, shape))
    if not tensors or tensors[0].role != "x":
        raise OptionError(f"A batch must be (x,), (x, y) or (x, y, sample_weight); a {what} gave {batch!r}.")
    structures = {role: structure_of(part) for role, part in zip(ROLES, batch, strict=False)}
    return Layout(tuple(tensors), (), {}, (), {}, structures=structures, wraps_x=wraps_x)


def parts_of(batch: Any) -> dict[tuple[Role, str | None], Any]:
    """Return the arrays or tensors of a batch by the roles and names that they have in a layout."""
    by_role = zip(ROLES, as_tuple(batch), strict=False)
    return {(role, name_of(path)): value for role, part in by_role for path, value in leaves(part)}


def as_tuple(batch: Any) -> tuple[Any, ...]:
    """(x,), (x, y) or (x, y, sample_weight); what is no tuple or list is x alone, as in Keras."""
    if not isinstance(batch, tuple | list):
        return (batch,)
    batch = tuple(batch)
    while len(batch) > 1 and batch[-1] is None:
        batch = batch[:-1]
    if not 1 <= len(batch) <= 3:
        raise OptionError(f"A batch must be (x,), (x, y) or (x, y, sample_weight); got {len(batch)} parts.")
    return batch


def as_array(value: Any) -> np.ndarray:
    """An array, or a tensor of TensorFlow or torch, as an array; a sparse one as a dense one."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if type(value).__name__ == "RaggedTensor":
        raise OptionError(
            "The parts of a batch must be dense arrays; got a RaggedTensor. Make it dense, as by `tensor.to_tensor()`."
        )
    is_sparse = _is(value, "tensorflow.python.", "SparseTensor")
    if is_sparse or hasattr(value, "todense"):  # as SciPy's and JAX's have it
        warnings.warn(f"Sparse batches are made dense; got a {type(value).__name__}.", stacklevel=2)
        if is_sparse:
            import tensorflow as tf

            value = tf.sparse.to_dense(value)
        else:
            value = value.todense()
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array  # which NumPy does not know


def _guarded(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except RaykerasError:
        raise
    except Exception as error:
        raise user_code_error(error, None) from error


def _is(data: Any, module: str, *names: str) -> bool:
    return any(cls.__name__ in names and f"{cls.__module__}.".startswith(module) for cls in type(data).__mro__)


def _copied(part: Any) -> Any:
    """The same with arrays of its own, since a generator may use its arrays again."""
    if isinstance(part, Mapping):
        return {name: _copied(value) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return tuple(_copied(value) for value in part)
    return None if part is None else np.array(as_array(part))


def _numpy_dtype(tensor: Tensor) -> np.dtype:
    return np.dtype(object if tensor.dtype == "string" else tensor.dtype)


def other_shape(tensor: Tensor, shape: tuple[int, ...], number: int) -> OptionError:
    """Return the error about a batch whose rows have another shape."""
    return OptionError(
        f"The rows of all batches must have one shape; those of {tensor.label} are {_described(tensor.shape)}, and "
        f"{_described(shape)} in batch {number}. Where a dimension varies, leave it open in the model's input, "
        "`keras.Input((None, ...))`."
    )


def fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(w in (None, n) for w, n in zip(wanted, shape, strict=True))


def _described(shape: Sequence[int | None]) -> str:
    return "×".join("?" if n is None else str(n) for n in shape) or "single numbers"


def _listed(layout: Layout) -> str:
    return ", ".join(f"{tensor.label} {_described(tensor.shape)}" for tensor in layout.tensors)
