"""Adapter for objects that make batches: `tf.data.Dataset`, `PyDataset`, `Sequence`, torch `DataLoader`, generators.

It infers the batch spec before training starts and converts batches to arrays. `raykeras.data.adapters.epochs`
iterates over them, according to their kind:

    dataset     iterated again in each pass
    sequence    indexed; if shuffled, in an order that depends on (seed, pass); its hooks are called in each epoch
    loader      iterated again in each pass
    generator   iterated once
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from raykeras.core.error_context import user_code_error
from raykeras.core.errors import OptionError, RaykerasError
from raykeras.core.structures import leaves, name_of, structure_of
from raykeras.data.batch_spec import ROLES, BatchSpec, ElementSpec, Role

Kind = Literal["dataset", "sequence", "loader", "generator"]

Flat = list[np.ndarray]
"""A batch as arrays, in the order of the batch spec's tensors."""

_SAMPLE_ROWS = 8


@dataclass(frozen=True)
class Batches:
    """An object that makes batches, and what is known about them.

    Attributes:
        data: The object that the user passed; None in a process that only receives its batches.
        kind: Kind of the object.
        num_batches: Batches in a pass; None if unknown or infinite.
        batch_spec: Spec of a batch; unknown dimensions of a row are None.
        is_infinite: Whether a pass never ends.
        taken: Batches that were taken from a generator to infer the spec; they come first.
        sample: The first rows as arrays, if they were available without iterating over a dataset.
        batch_s: Seconds to make a batch; 0 if unknown.
        batch_nbytes: Bytes of a batch; 0 if unknown.
    """

    data: Any
    kind: Kind
    num_batches: int | None
    batch_spec: BatchSpec
    is_infinite: bool = False
    taken: tuple[Any, ...] = ()
    sample: tuple[np.ndarray, ...] = ()
    batch_s: float = 0.0
    batch_nbytes: int = 0

    @property
    def type_name(self) -> str:
        """The type of the object, for messages."""
        return {"dataset": "tf.data.Dataset", "loader": "DataLoader"}.get(self.kind, self.kind)

    def without_data(self) -> Batches:
        """Return a copy that can be pickled: without the user's object."""
        return replace(self, data=None, taken=())

    def x_only(self) -> Batches:
        """Return a copy whose spec has only the tensors of x."""
        num_tensors = len(self.batch_spec.role("x"))
        batch_spec = replace(self.batch_spec, tensors=self.batch_spec.tensors[:num_tensors])
        return replace(self, batch_spec=batch_spec, sample=self.sample[:num_tensors])

    def flat(self, batch: Any, number: int, *, copy: bool = False) -> Flat:
        """Convert a batch to arrays with the dtypes and ranks of the batch spec.

        Args:
            batch: The batch as the user's object returned it.
            number: Index of the batch, for messages.
            copy: Whether to copy arrays that already have the right dtype.

        Raises:
            OptionError: If the batch does not match the spec.
        """
        parts, arrays = parts_of(batch), []
        for tensor in self.batch_spec.tensors:
            value = parts.get((tensor.role, tensor.name))
            if value is None:
                raise OptionError(f"All batches must have the same structure; batch {number} has no {tensor.label}.")
            array = as_array(value)
            if array.ndim != 1 + len(tensor.shape):
                raise shape_error(tensor, array.shape[1:], number)
            arrays.append(array.astype(_numpy_dtype(tensor), copy=copy))
        rows = [len(array) for array in arrays]
        if min(rows) != max(rows) or not rows[0]:
            named = ", ".join(f"{t.label} {n}" for t, n in zip(self.batch_spec.tensors, rows, strict=True))
            raise OptionError(
                f"All arrays of a batch must have the same number of rows, at least 1; batch {number}: {named}."
            )
        return arrays


def as_batches(data: Any, floatx: str) -> Batches | None:
    """Return an adapter for an object that was passed as x, or None if it does not make batches.

    Args:
        data: The object.
        floatx: Dtype to which arrays of floats are converted.

    Raises:
        OptionError: If the batches cannot be used.
        UserCodeError: If the user's code raises while it makes the first batches.
    """
    if _is_instance(data, "tensorflow.data.Dataset"):
        return _from_dataset(data)
    if _is_instance(data, "tensorflow.distribute.DistributedDataset"):
        raise OptionError(
            "A dataset must not be distributed already, because raykeras distributes it over the workers; got a "
            f"{type(data).__name__}. Pass the tf.data.Dataset itself."
        )
    if _is_instance(data, "keras.utils.PyDataset", "tf_keras.utils.Sequence"):
        return _call_user_code(lambda: _from_sequence(data, floatx))
    if _is_instance(data, "torch.utils.data.DataLoader"):
        return _call_user_code(lambda: _from_loader(data, floatx))
    if isinstance(data, Iterator):
        wraps_x = False

        def first_batches() -> Iterator[Any]:
            nonlocal wraps_x
            for batch in itertools.islice(data, 2):
                wraps_x = isinstance(batch, tuple)
                yield _copy(as_tuple(batch))  # the generator may reuse the arrays for the next batch

        taken = _call_user_code(lambda: tuple(first_batches()))
        batch_spec = _infer_spec(taken, "generator", floatx, wraps_x)
        return _with_sample(Batches(data, "generator", None, batch_spec, taken=taken), taken)
    return None


def _from_dataset(data: Any) -> Batches:
    cardinality = int(data.cardinality())
    if cardinality == 0:
        raise OptionError("A tf.data.Dataset must have at least one batch; this one is empty.")
    sizes = set()

    def dtype_and_shape(tensor: Any) -> tuple[str, tuple[int | None, ...]]:
        if not _is_instance(tensor, "tensorflow.TensorSpec"):
            raise OptionError(
                f"The batches of a tf.data.Dataset must hold dense tensors; got {tensor}. Convert them in "
                "`Dataset.map`, for example with `tensor.to_tensor()`."
            )
        if tensor.shape.rank is None:
            raise OptionError(
                f"The tensors of a tf.data.Dataset must have a known rank; got {tensor}. Set it in `Dataset.map` with "
                "`tf.ensure_shape(tensor, [None, ...])`."
            )
        sizes.add(tensor.shape[0] if tensor.shape.rank else "scalar")
        return tensor.dtype.name, tuple(tensor.shape)[1:]

    batch_spec = _make_spec(
        as_tuple(data.element_spec), dtype_and_shape, "tf.data.Dataset", wraps_x=isinstance(data.element_spec, tuple)
    )
    if "scalar" in sizes or len(sizes - {None}) > 1:
        raise OptionError(
            f"The elements of a tf.data.Dataset must be batches, rows first; got {data.element_spec}. Call "
            "`dataset.batch(...)`."
        )
    return Batches(data, "dataset", cardinality if cardinality > 0 else None, batch_spec, cardinality == -1)


def _from_sequence(data: Any, floatx: str) -> Batches:
    try:
        length = data.num_batches if hasattr(type(data), "num_batches") else len(data)
    except NotImplementedError:
        length = None  # infinite, as in `PyDataset.__iter__`
    if length is not None and length < 1:
        raise OptionError("A Sequence must have at least one batch; this one has none.")
    examples, batch_s = [], []
    for index in (0, 1 if length is None else length - 1):
        start = time.perf_counter()
        examples.append(data[index])
        batch_s.append(time.perf_counter() - start)
    batch_spec = _infer_spec(examples, "Sequence", floatx, wraps_x=not _is_instance(data, "tf_keras.utils.Sequence"))
    batches = Batches(data, "sequence", length and int(length), batch_spec, length is None, batch_s=min(batch_s))
    return _with_sample(batches, examples)


def _from_loader(data: Any, floatx: str) -> Batches:
    try:
        length = len(data)
    except TypeError:  # the loader of an IterableDataset
        length = None
    examples = list(itertools.islice(data, 2))
    return _with_sample(
        Batches(data, "loader", length, _infer_spec(examples, "DataLoader", floatx, wraps_x=True)), examples
    )


def _with_sample(batches: Batches, examples: Sequence[Any]) -> Batches:
    """Add the sample and the size of the first example, and check that all examples match the spec."""
    first, *_ = (batches.flat(batch, number) for number, batch in enumerate(examples))
    sample = tuple(array[:_SAMPLE_ROWS].copy() for array in first)
    return replace(batches, sample=sample, batch_nbytes=sum(array.nbytes for array in first))


def _infer_spec(batches: Sequence[Any], type_name: str, floatx: str, wraps_x: bool) -> BatchSpec:
    """Return the spec of batches of arrays; a dimension in which their rows differ is None."""
    if not batches:
        raise OptionError(f"A {type_name} must have at least one batch; this one has none.")

    def dtype_and_shape(value: Any) -> tuple[str, tuple[int | None, ...]]:
        array = as_array(value)
        if not array.ndim:
            raise OptionError(f"The parts of a batch must be arrays, rows first; got {value!r} from a {type_name}.")
        if array.dtype.kind == "O" and not all(isinstance(item, str | bytes) for item in array.flat):
            raise OptionError(
                "The arrays of a batch must hold numbers or text; got an array of objects such as "
                f"{array.flat[0]!r} from a {type_name}. Pad rows of different lengths."
            )
        is_text = array.dtype.kind in "OSU"
        return "string" if is_text else floatx if array.dtype.kind == "f" else array.dtype.name, array.shape[1:]

    first, *others = (_make_spec(as_tuple(batch), dtype_and_shape, type_name, wraps_x) for batch in batches)
    tensors = list(first.tensors)
    for other in others:
        for i, (a, b) in enumerate(itertools.zip_longest(tensors, other.tensors)):
            if a is None or b is None or a.label != b.label or len(a.shape) != len(b.shape):
                raise OptionError(
                    f"All batches must have the same structure; got {_spec_text(first)} and {_spec_text(other)} from "
                    f"a {type_name}."
                )
            tensors[i] = replace(a, shape=tuple(m if m == n else None for m, n in zip(a.shape, b.shape, strict=True)))
    return replace(first, tensors=tuple(tensors))


def _make_spec(
    batch: tuple[Any, ...],
    dtype_and_shape: Callable[[Any], tuple[str, tuple[int | None, ...]]],
    type_name: str,
    wraps_x: bool,
) -> BatchSpec:
    """Return the spec of a batch, with the dtype and the shape of a row that a function returns for each part."""
    tensors: list[ElementSpec] = []
    for (role, name), value in parts_of(batch).items():
        dtype, shape = dtype_and_shape(value)
        tensors.append(ElementSpec(role, name, (), "string" if dtype == "string" else "dense", dtype, shape))
    if not tensors or tensors[0].role != "x":
        raise OptionError(f"A batch must be (x,), (x, y) or (x, y, sample_weight); got {batch!r} from a {type_name}.")
    structures = {role: structure_of(part) for role, part in zip(ROLES, batch, strict=False)}
    return BatchSpec(tuple(tensors), (), {}, (), {}, structures=structures, wraps_x=wraps_x)


def parts_of(batch: Any) -> dict[tuple[Role, str | None], Any]:
    """Return the arrays or tensors of a batch by their roles and names in a batch spec."""
    by_role = zip(ROLES, as_tuple(batch), strict=False)
    return {(role, name_of(path)): value for role, part in by_role for path, value in leaves(part)}


def as_tuple(batch: Any) -> tuple[Any, ...]:
    """Return a batch as (x,), (x, y) or (x, y, sample_weight). As in Keras, anything but a tuple or list is x."""
    if not isinstance(batch, tuple | list):
        return (batch,)
    batch = tuple(batch)
    while len(batch) > 1 and batch[-1] is None:
        batch = batch[:-1]
    if not 1 <= len(batch) <= 3:
        raise OptionError(f"A batch must be (x,), (x, y) or (x, y, sample_weight); got {len(batch)} parts.")
    return batch


def as_array(value: Any) -> np.ndarray:
    """Convert an array, or a tensor of TensorFlow or torch, to a dense NumPy array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if _is_instance(value, "tensorflow.RaggedTensor"):
        raise OptionError(
            "The parts of a batch must be dense arrays; got a RaggedTensor. Convert it with `tensor.to_tensor()`."
        )
    is_sparse = _is_instance(value, "tensorflow.SparseTensor")
    if is_sparse or hasattr(value, "todense"):  # SciPy's and JAX's sparse arrays have `todense`
        warnings.warn(f"Sparse batches are converted to dense arrays; got a {type(value).__name__}.", stacklevel=2)
        if is_sparse:
            import tensorflow as tf

            value = tf.sparse.to_dense(value)
        else:
            value = value.todense()
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array  # not a NumPy dtype


def _call_user_code(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except RaykerasError:
        raise
    except Exception as error:
        raise user_code_error(error, None) from error


def _is_instance(value: Any, *names: str) -> bool:
    """Return whether a value is an instance of a class, without importing the package of the class.

    Args:
        value: The value.
        names: Public names of classes, such as "tensorflow.data.Dataset"; one of them suffices.
    """
    return any(isinstance(value, _loaded(name)) for name in names)


def _loaded(name: str) -> Any:
    """Return the class of a public name; an empty tuple if its package is not loaded."""
    package, *attributes = name.split(".")
    if package not in sys.modules:
        return ()
    value: Any = sys.modules[package]
    return functools.reduce(lambda owner, attribute: getattr(owner, attribute, ()), attributes, value)


def _copy(part: Any) -> Any:
    if isinstance(part, Mapping):
        return {name: _copy(value) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return tuple(_copy(value) for value in part)
    return None if part is None else np.array(as_array(part))


def _numpy_dtype(tensor: ElementSpec) -> np.dtype:
    return np.dtype(object if tensor.dtype == "string" else tensor.dtype)


def shape_error(tensor: ElementSpec, shape: tuple[int, ...], number: int) -> OptionError:
    """Return the error for a batch whose rows have another shape than the spec."""
    return OptionError(
        f"The rows of all batches must have the same shape; those of {tensor.label} are {_shape_text(tensor.shape)}, "
        f"but {_shape_text(shape)} in batch {number}. If a dimension varies, set it to None in the model's input: "
        "`keras.Input((None, ...))`."
    )


def matches_shape(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    """Return whether a shape matches one whose unknown dimensions are None."""
    return len(shape) == len(wanted) and all(w in (None, n) for w, n in zip(wanted, shape, strict=True))


def _shape_text(shape: Sequence[int | None]) -> str:
    return "×".join("?" if n is None else str(n) for n in shape) or "scalars"


def _spec_text(batch_spec: BatchSpec) -> str:
    return ", ".join(f"{tensor.label} {_shape_text(tensor.shape)}" for tensor in batch_spec.tensors)
