"""Check before the first step that a model fits its data and can be trained, and adapt the batch spec to it."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from raykeras.compat.keras_api import KerasAPI, loss_arguments
from raykeras.core.errors import ModelError
from raykeras.core.structures import is_deep
from raykeras.data.batch_spec import BatchSpec, ElementSpec
from raykeras.data.sources.base import did_you_mean, join_names


def check_model(model: Any, api: KerasAPI, batch_spec: BatchSpec) -> BatchSpec:
    """Return the batch spec as the model takes it.

    Args:
        model: The model.
        api: The model's Keras package.
        batch_spec: Spec of the batches that the data provides.

    Raises:
        ModelError: If the model is not compiled or does not fit the data.
    """
    if not api.is_compiled(model):
        raise ModelError(f"A model must be compiled; {model.name!r} is not. Call `model.compile(...)` first.")
    batch_spec = _without_unknown_inputs(model, api, batch_spec)
    _check_inputs(model, api, batch_spec)
    _check_outputs(model, api, batch_spec)
    return _with_num_classes(model, api, _with_listed_weights(model, api, _with_open_sizes(model, api, batch_spec)))


def _with_listed_weights(model: Any, api: KerasAPI, batch_spec: BatchSpec) -> BatchSpec:
    """Return the batch spec with sample weights as a list if the outputs are a list and Keras requires it."""
    names, weights = api.output_names(model), batch_spec.role("sample_weight")
    if not api.requires_listed_weights or names is None or isinstance(model.outputs, dict):
        return batch_spec
    struct = api.output_structure(model)
    if batch_spec.is_sequence("sample_weight") or not isinstance(struct, list | tuple):
        return batch_spec
    if {str(t.name) for t in weights} != set(names):
        return batch_spec
    return batch_spec.with_structure("sample_weight", tuple(names))


def _without_unknown_inputs(model: Any, api: KerasAPI, batch_spec: BatchSpec) -> BatchSpec:
    """Return the batch spec without tensors of x that are not inputs, if it has all inputs; warn as Keras does."""
    shapes, names = api.input_shapes(model), [tensor.name for tensor in batch_spec.role("x")]
    if shapes is None or batch_spec.is_sequence("x") or None in names or not set(shapes) < set(names):
        return batch_spec
    unknown = [str(name) for name in names if name not in shapes]
    warnings.warn(
        f"x should name only the model's inputs; got {join_names(unknown)} as well, which the model ignores. Inputs: "
        f"{join_names(shapes)}.",
        stacklevel=2,
    )
    tensors = tuple(tensor for tensor in batch_spec.tensors if tensor.role != "x" or tensor.name in shapes)
    return dataclasses.replace(batch_spec, tensors=tensors).with_structure("x", {name: name for name in shapes})


def _with_open_sizes(model: Any, api: KerasAPI, batch_spec: BatchSpec) -> BatchSpec:
    """Return the spec of user batches with None for the sizes that the model's inputs leave open."""
    shapes = api.input_shapes(model)
    if shapes is None or any(tensor.columns for tensor in batch_spec.tensors):
        return batch_spec
    names, sizes, tensors = list(shapes), set[tuple[int, int | None]](), []
    for tensor in batch_spec.tensors:
        shape = tensor.shape
        if tensor.role == "x":
            index = 0 if tensor.name is None else int(tensor.name) if batch_spec.is_sequence("x") else None
            input_shape = shapes[str(tensor.name) if index is None else names[index]] or ()
            if len(input_shape) == len(shape):
                sizes |= {(axis, shape[axis]) for axis, size in enumerate(input_shape) if size is None}
        # tensors that match x along an axis, such as the labels of a sequence, vary with it
        open_shape = tuple(None if (axis, size) in sizes else size for axis, size in enumerate(shape))
        tensors.append(dataclasses.replace(tensor, shape=open_shape))
    return dataclasses.replace(batch_spec, tensors=tuple(tensors))


def _check_inputs(model: Any, api: KerasAPI, batch_spec: BatchSpec) -> None:
    shapes, structure = api.input_shapes(model), batch_spec.structures.get("x")
    if shapes is None:
        return
    names, tensors = list(shapes), batch_spec.role("x")
    if is_deep(structure):
        raise ModelError(
            f"x must be nested like the model's inputs; got {structure!r:.200}, and the inputs are "
            f"{join_names(names)}. Pass an array, or a list or dict of arrays."
        )
    text = [tensor for tensor in tensors if tensor.kind == "string"]
    if text and not any(tensor.dtype in ("string", "object") for tensor in model.inputs):
        raise ModelError(
            f"A numeric input needs numeric data; {_columns(text)} holds text or bytes. Leave it out, convert it to "
            'numbers in `transform`, or start the model with an input of dtype "string" and a preprocessing layer.'
        )
    if tensors[0].name is None:
        if len(names) > 1:
            raise ModelError(
                f"x must name the inputs of a model that has several; got one tensor for {join_names(names)}. "
                f"Pass `x={{{names[0]!r}: ..., {names[1]!r}: ...}}`."
            )
        _check_shape(names[0], shapes[names[0]], tensors[0])
        return
    tensor_of = {str(t.name): t for t in tensors}
    none_names = [name for name, item in structure.items() if item is None] if isinstance(structure, Mapping) else []
    if isinstance(structure, tuple):
        if len(structure) != len(names):
            raise ModelError(f"x must hold one array for each input; got {len(structure)} for {join_names(names)}.")
        none_names = [name for name, item in zip(names, structure, strict=True) if item is None]
        tensor_of = {name: tensor_of[item] for name, item in zip(names, structure, strict=True) if item is not None}
    for name in tensor_of:
        if name not in shapes:
            raise ModelError(
                f"x must name the model's inputs; got {name!r}.{did_you_mean(name, shapes)} "
                f"Inputs: {join_names(names)}."
            )
    for name in none_names:
        if name in shapes and not api.is_optional(model, name):
            raise ModelError(
                f"Only an optional input accepts None; {name!r} is not optional. Pass an array, or create the input "
                "with `keras.Input(..., optional=True)`."
            )
    for name, shape in shapes.items():
        if name in none_names:
            continue
        if name not in tensor_of:
            raise ModelError(
                f"x must name all of the model's inputs; {name!r} is missing. Got: {join_names(tensor_of)}."
            )
        _check_shape(name, shape, tensor_of[name])


def _check_outputs(model: Any, api: KerasAPI, batch_spec: BatchSpec) -> None:
    if not api.inherits(model, "train_step"):
        return  # a custom `train_step` may take anything
    tensors = batch_spec.role("y")
    if not tensors:
        if getattr(model, "loss", None):
            raise ModelError(
                f"Target data is missing. A model compiled with a loss needs y; got {_loss_name(model.loss)} and no "
                'y. Pass `y="column"`, or compile without a loss and use `add_loss`.'
            )
        return
    text = [t for t in tensors if t.kind == "string" and _is_loss_of_keras(getattr(model, "loss", None), t.name)]
    if text:
        raise ModelError(
            f"Keras' losses need numeric labels; {_columns(text)} holds text. Convert it in `transform`, for example "
            f"by `np.searchsorted([b'cat', b'dog'], columns[{(text[0].columns or ('label',))[0]!r}])`."
        )
    names = api.output_names(model)
    structure = batch_spec.structures.get("y")
    if names is None or tensors[0].name is None or isinstance(structure, tuple) or is_deep(structure):
        return
    for tensor in tensors:
        if tensor.name not in names:
            raise ModelError(
                f"y must name the model's outputs; got {tensor.name!r}.{did_you_mean(str(tensor.name), names)} "
                f"Outputs: {join_names(names)}."
            )


def _columns(tensors: Sequence[ElementSpec]) -> str:
    """Return the columns of tensors, or where they are in the user's batches, for messages."""
    return ", ".join(repr(name) for tensor in tensors for name in tensor.columns or (tensor.label,))


def _is_loss_of_keras(loss: Any, output: str | None) -> bool:
    """Return whether an output is trained with a loss that Keras defines."""
    if isinstance(loss, Mapping):
        loss = next(iter(loss.values()), None) if output is None else loss.get(output)
    if isinstance(loss, str):
        return True
    kind = loss if isinstance(loss, types.FunctionType) else type(loss)
    return kind.__module__.split(".")[0] in ("keras", "tf_keras")


def _with_num_classes(model: Any, api: KerasAPI, batch_spec: BatchSpec) -> BatchSpec:
    """Return the batch spec with the number of classes of each y that is a label of sparse crossentropy."""
    outputs, tensors, loss = getattr(model, "outputs", None), batch_spec.role("y"), getattr(model, "loss", None)
    if not isinstance(outputs, list | tuple) or len(outputs) < len(tensors) or is_deep(batch_spec.structures.get("y")):
        return batch_spec
    if api.has_own_steps(model):
        return batch_spec  # custom code may change the labels
    names: list[Any] = api.output_names(model) or [""] * len(outputs)
    if isinstance(loss, Mapping):
        losses = [loss.get(name) for name in names]
    else:
        losses = list(loss) if isinstance(loss, list | tuple) else [loss] * len(outputs)
    sizes = [
        output.shape[-1] if _takes_labels(output_loss) else None
        for output, output_loss in zip(outputs, losses, strict=False)
    ]
    if batch_spec.is_sequence("y"):
        names = [str(number) for number in range(len(outputs))]
    elif tensors and tensors[0].name is None:
        names = [None]
    num_classes = dict(zip(names, sizes, strict=False))
    changed = (
        dataclasses.replace(tensor, num_classes=num_classes.get(tensor.name))
        if tensor.role == "y" and tensor.kind == "dense"
        else tensor
        for tensor in batch_spec.tensors
    )
    return dataclasses.replace(batch_spec, tensors=tuple(changed))


def _takes_labels(loss: Any) -> bool:
    """Return whether a loss takes labels from 0 to below the number of classes, and no others."""
    if isinstance(loss, str):
        return loss == "sparse_categorical_crossentropy"
    loss_type = loss if isinstance(loss, types.FunctionType) else type(loss)
    if loss_type.__module__.split(".")[0] not in ("keras", "tf_keras"):
        return False
    options = {} if isinstance(loss, types.FunctionType) else loss_arguments(loss)
    is_default = options.get("ignore_class") is None and options.get("axis", -1) == -1
    return is_default and loss_type.__name__ in ("sparse_categorical_crossentropy", "SparseCategoricalCrossentropy")


def _check_shape(name: str, input_shape: tuple[Any, ...] | None, tensor: ElementSpec) -> None:
    if input_shape is None or tensor.kind == "ragged":
        return
    shape = tensor.shape
    # Keras adds or drops a last axis of size 1
    candidates = [shape, (*shape, 1)] + ([shape[:-1]] if shape[-1:] == (1,) else [])
    if any(
        len(s) == len(input_shape) and all(n is None or m in (None, n) for n, m in zip(input_shape, s, strict=True))
        for s in candidates
    ):
        return
    if not tensor.columns:  # of the user's batches
        raise ModelError(
            f"Batches must match the shapes of the model's inputs; input {name!r} takes {_shape_text(input_shape)} per "
            f"row and {tensor.label} has {_shape_text(shape)}. Change the input, or reshape the batches."
        )
    columns = " and ".join(map(repr, tensor.columns))
    raise ModelError(
        f"A column must match the shape of its input; input {name!r} takes {_shape_text(input_shape)} per row and "
        f"column {columns} has {_shape_text(shape)}. Change the input, or reshape in `transform`."
    )


def _shape_text(shape: tuple[Any, ...]) -> str:
    return "a single number" if not shape else "×".join("?" if n is None else str(n) for n in shape)


def _loss_name(loss: Any) -> str:
    return repr(loss) if isinstance(loss, str | list | dict) else getattr(loss, "name", type(loss).__name__)
