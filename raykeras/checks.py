"""Whether a model fits its data and can be trained, before the first step.

Enters: a built model and the layout of its data. Leaves: the layout as the model takes it, or a
`ModelError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
import warnings
from collections.abc import Mapping
from typing import Any

from raykeras.checkpoint import Checkpoint
from raykeras.columns import Layout, Tensor
from raykeras.errors import CheckpointError, ModelError
from raykeras.keras_api import KerasAPI
from raykeras.options import Scale
from raykeras.sources import listed, nearest
from raykeras.structures import is_deep


def check_model(model: Any, api: KerasAPI, layout: Layout) -> Layout:
    """The layout as the model takes it.

    Raises:
        ModelError: The rule that is broken, both sides, and what to do.
    """
    if not api.is_compiled(model):
        raise ModelError(f"A model must be compiled; {model.name!r} is not. Call `model.compile(...)` first.")
    layout = _without_other_inputs(model, api, layout)
    _check_inputs(model, api, layout)
    _check_outputs(model, api, layout)
    return _with_num_classes(model, api, _conformed(model, api, _with_open_dimensions(model, api, layout)))


def variables_of(model: Any) -> list[str]:
    """The variables that a model must have to go on in another one's place, by name and shape."""
    return [f"{v.name.split('/')[-1].split(':')[0]} {list(v.shape)}" for v in model.variables]


def signature_of(model: Any, api: KerasAPI) -> dict[str, Any]:
    """The optimizer that a model must have, too, before it is trained."""
    optimizer = getattr(model, "optimizer", None)
    options: dict[str, Any] = {}
    with contextlib.suppress(NotImplementedError):  # one of TensorFlow's own has no config
        options = {} if optimizer is None else optimizer.get_config()
    options.pop("name", None)  # counted up in a process
    if optimizer is not None and int(optimizer.iterations.numpy()):
        options.pop("learning_rate", None)  # callbacks may have changed it
    return {
        "optimizer": type(optimizer).__name__,
        "options": json.loads(json.dumps(options, default=str, sort_keys=True)),
        "keras": api.name,
    }


def check_signature(taken: Checkpoint, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """That a model can go on from a checkpoint; the signatures of both.

    Raises:
        CheckpointError: Both sides, and what to do.
    """
    for name in ("keras", "variables", "optimizer"):
        _require_same(taken, "model" if name == "variables" else name, theirs[name], ours[name])
    for name in {**theirs["options"], **ours["options"]}:
        if name == "learning_rate" and not (name in theirs["options"] and name in ours["options"]):
            continue
        _require_same(taken, f"optimizer's {name}", theirs["options"].get(name), ours["options"].get(name))


def _require_same(taken: Checkpoint, what: str, theirs: Any, ours: Any) -> None:
    if theirs != ours:
        raise CheckpointError(
            f"A run goes on with the {what} that it began with; {taken.path} has {theirs}, this one has {ours}. Make "
            'them the same, or take only its weights with `Run(resume="weights")`, or give the run another `name`.'
        )


def check_execution(model: Any, scale: Scale) -> None:
    """That the model can be executed on so many replicas.

    Raises:
        ModelError: If it was made for other replicas.
    """
    strategy = model.distribute_strategy
    if strategy.num_replicas_in_sync not in (1, scale.num_replicas):
        raise ModelError(
            "A model must not be made in a strategy's scope, since `scale` says how many replicas there are; got a "
            f"{type(strategy).__name__} of {strategy.num_replicas_in_sync} replicas. Make the model outside of "
            f"`strategy.scope()`, and pass `scale=rk.Scale(replicas_per_worker={strategy.num_replicas_in_sync})`."
        )


def _conformed(model: Any, api: KerasAPI, layout: Layout) -> Layout:
    """The layout as the model takes it: Keras 3 wants the weights of a list of outputs as a list too."""
    names, weights = api.output_names(model), layout.role("sample_weight")
    if api.is_legacy or names is None or isinstance(model.outputs, dict) or layout.is_sequence("sample_weight"):
        return layout
    struct = getattr(model, "_outputs_struct", None)
    if not isinstance(struct, list | tuple) or {str(t.name) for t in weights} != set(names):
        return layout
    return layout.with_structure("sample_weight", tuple(names))


def _without_other_inputs(model: Any, api: KerasAPI, layout: Layout) -> Layout:
    """The layout without what is named in x and is no input, where all inputs are given; warns as Keras does."""
    shapes, names = api.input_shapes(model), [tensor.name for tensor in layout.role("x")]
    if shapes is None or layout.is_sequence("x") or None in names or not set(shapes) < set(names):
        return layout
    others = [str(name) for name in names if name not in shapes]
    warnings.warn(
        f"x should name the model's inputs only; got {listed(others)} as well, which the model does not get. Inputs: "
        f"{listed(shapes)}.",
        stacklevel=2,
    )
    tensors = tuple(tensor for tensor in layout.tensors if tensor.role != "x" or tensor.name in shapes)
    return dataclasses.replace(layout, tensors=tensors).with_structure("x", {name: name for name in shapes})


def _with_open_dimensions(model: Any, api: KerasAPI, layout: Layout) -> Layout:
    """The layout of batches that the user makes, of which dimensions that the inputs leave open may vary."""
    shapes = api.input_shapes(model)
    if shapes is None or any(tensor.columns for tensor in layout.tensors):
        return layout
    names, sizes, tensors = list(shapes), set[tuple[int, int | None]](), []
    for tensor in layout.tensors:
        shape = tensor.shape
        if tensor.role == "x":
            index = 0 if tensor.name is None else int(tensor.name) if layout.is_sequence("x") else None
            wanted = shapes[str(tensor.name) if index is None else names[index]] or ()
            if len(wanted) == len(shape):
                sizes |= {(axis, shape[axis]) for axis, size in enumerate(wanted) if size is None}
        # what goes with x row by row, as labels of a sequence do, varies with it
        open_shape = tuple(None if (axis, size) in sizes else size for axis, size in enumerate(shape))
        tensors.append(dataclasses.replace(tensor, shape=open_shape))
    return dataclasses.replace(layout, tensors=tuple(tensors))


def _check_inputs(model: Any, api: KerasAPI, layout: Layout) -> None:
    shapes, structure = api.input_shapes(model), layout.structures.get("x")
    if shapes is None:
        return
    names, tensors = list(shapes), layout.role("x")
    if is_deep(structure):
        raise ModelError(
            f"x must be nested as the model's inputs; it is {structure!r:.200}, and the inputs are {listed(names)}. "
            "Give an array, or a list or dict of arrays."
        )
    text = [tensor for tensor in tensors if tensor.kind == "string"]
    if text and not any(tensor.dtype in ("string", "object") for tensor in _input_tensors(model)):
        columns = ", ".join(repr(name) for tensor in text for name in tensor.columns or (tensor.label,))
        raise ModelError(
            f"An input of numbers must get numbers; {columns} holds text. Leave it out, make numbers of it in "
            '`transform`, or begin the model with an input of dtype "string" and a preprocessing layer.'
        )
    if tensors[0].name is None:
        if len(names) > 1:
            raise ModelError(
                f"A model with several inputs needs x by their names; it has {listed(names)}, and x is one tensor. "
                f"Give `x={{{names[0]!r}: ..., {names[1]!r}: ...}}`."
            )
        _check_shape(names[0], shapes[names[0]], tensors[0])
        return
    given = {str(t.name): t for t in tensors}
    absent = [name for name, part in structure.items() if part is None] if isinstance(structure, Mapping) else []
    if isinstance(structure, tuple):
        if len(structure) != len(names):
            raise ModelError(f"x must hold one array for each input; got {len(structure)} for {listed(names)}.")
        absent = [name for name, part in zip(names, structure, strict=True) if part is None]
        given = {name: given[part] for name, part in zip(names, structure, strict=True) if part is not None}
    for name in given:
        if name not in shapes:
            raise ModelError(
                f"x must name the model's inputs; got {name!r}.{nearest(name, shapes)} Inputs: {listed(names)}."
            )
    for name in absent:
        if name in shapes and not api.is_optional(model, name):
            raise ModelError(
                f"Only an optional input takes None; {name!r} is not optional. Give it an array, or make it with "
                "`keras.Input(..., optional=True)`."
            )
    for name, shape in shapes.items():
        if name in absent:
            continue
        if name not in given:
            raise ModelError(f"x must name all of the model's inputs; {name!r} is missing. Given: {listed(given)}.")
        _check_shape(name, shape, given[name])


def _input_tensors(model: Any) -> list[Any]:
    inner = getattr(model, "_functional", None) or model
    return list(inner.inputs)


def _check_outputs(model: Any, api: KerasAPI, layout: Layout) -> None:
    if not api.is_plain(model, "train_step"):
        return  # the user's own step may want anything
    tensors = layout.role("y")
    if not tensors:
        if getattr(model, "loss", None):
            raise ModelError(
                f"Target data is missing. A model compiled with a loss needs y; got {_named(model.loss)} and no y. "
                'Give `y="column"`, or compile without a loss and use `add_loss`.'
            )
        return
    names = api.output_names(model)
    structure = layout.structures.get("y")
    if names is None or tensors[0].name is None or isinstance(structure, tuple) or is_deep(structure):
        return
    for tensor in tensors:
        if tensor.name not in names:
            raise ModelError(
                f"y must name the model's outputs; got {tensor.name!r}.{nearest(str(tensor.name), names)} "
                f"Outputs: {listed(names)}."
            )


def _with_num_classes(model: Any, api: KerasAPI, layout: Layout) -> Layout:
    """The layout with the number of classes of each y that holds labels of a sparse categorical crossentropy."""
    outputs, tensors, loss = getattr(model, "outputs", None), layout.role("y"), getattr(model, "loss", None)
    if not isinstance(outputs, list | tuple) or len(outputs) < len(tensors) or is_deep(layout.structures.get("y")):
        return layout
    if api.has_own_steps(model):
        return layout  # the user's own may make other labels of y
    names: list[Any] = api.output_names(model) or [""] * len(outputs)
    if isinstance(loss, Mapping):
        losses = [loss.get(name) for name in names]
    else:
        losses = list(loss) if isinstance(loss, list | tuple) else [loss] * len(outputs)
    sizes = [output.shape[-1] if _takes_labels(each) else None for output, each in zip(outputs, losses, strict=False)]
    if layout.is_sequence("y"):
        names = [str(number) for number in range(len(outputs))]
    elif tensors and tensors[0].name is None:
        names = [None]
    num_classes = dict(zip(names, sizes, strict=False))
    changed = (
        dataclasses.replace(tensor, num_classes=num_classes.get(tensor.name))
        if tensor.role == "y" and tensor.kind == "dense"
        else tensor
        for tensor in layout.tensors
    )
    return dataclasses.replace(layout, tensors=tuple(changed))


def _takes_labels(loss: Any) -> bool:
    """Whether a loss takes labels from 0 to the number of classes, and no others."""
    if isinstance(loss, str):
        return loss == "sparse_categorical_crossentropy"
    named = loss if isinstance(loss, types.FunctionType) else type(loss)
    if named.__module__.split(".")[0] not in ("keras", "tf_keras"):
        return False
    options = getattr(loss, "_fn_kwargs", {})
    is_default = options.get("ignore_class") is None and options.get("axis", -1) == -1
    return is_default and named.__name__ in ("sparse_categorical_crossentropy", "SparseCategoricalCrossentropy")


def _check_shape(name: str, wanted: tuple[Any, ...] | None, tensor: Tensor) -> None:
    if wanted is None or tensor.kind == "ragged":
        return
    given = tensor.shape
    # Keras itself adds or drops a last axis of one
    alike = [given, (*given, 1)] + ([given[:-1]] if given[-1:] == (1,) else [])
    if any(
        len(s) == len(wanted) and all(w is None or g in (None, w) for w, g in zip(wanted, s, strict=True))
        for s in alike
    ):
        return
    if not tensor.columns:  # of batches that the user makes
        raise ModelError(
            f"Batches must have the shape of the model's inputs; input {name!r} takes {_described(wanted)} a row and "
            f"{tensor.label} gives {_described(given)}. Change the input, or reshape the batches."
        )
    columns = " and ".join(map(repr, tensor.columns))
    raise ModelError(
        f"A column must have the shape of its input; input {name!r} takes {_described(wanted)} a row and column "
        f"{columns} gives {_described(given)}. Change the input, or reshape in `transform`."
    )


def _described(shape: tuple[Any, ...]) -> str:
    return "a single number" if not shape else "×".join("?" if n is None else str(n) for n in shape)


def _named(loss: Any) -> str:
    return repr(loss) if isinstance(loss, str | list | dict) else getattr(loss, "name", type(loss).__name__)
