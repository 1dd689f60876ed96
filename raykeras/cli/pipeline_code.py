"""The Python code of a new pipeline: constants, the model, and the function `pipeline`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raykeras.cli.literals import literal
from raykeras.cli.new_pipeline import NewPipeline
from raykeras.cli.target import Target
from raykeras.core.errors import printable_line, redacted
from raykeras.data.inspection import Column

_MAX_EMBEDDING = 16

_RESERVED = {"", "[UNK]", -1}  # fill values, and what Keras' lookup layers use for unknown values

_SMALL_IMAGE = 1024  # pixels; larger ones are averaged instead of flattened


def pipeline_code(new: NewPipeline) -> str:
    """Return the text of a pipeline file."""
    return _Code(new).text()


@dataclass
class _Code:
    """The text of a pipeline file.

    Attributes:
        new: What to write.
        constants: Lines that define constants.
        inputs: Lines of the dict of inputs.
        layers: Lines that define `branches`, one tensor (rows, k) for each input.
    """

    new: NewPipeline
    constants: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the file."""
        for name, model_input in self.new.suggestion.inputs.items():
            columns = [self.new.inspection.column(column) for column in model_input.columns]
            {
                "numbers": self._add_numbers,
                "text": self._add_lookup,
                "categories": self._add_lookup,
                "tensor": self._add_tensor,
            }[model_input.kind](name, columns)
        if self.new.target.classes:
            self.constants += [f"CLASSES = {literal(list(self.new.target.classes), indent=0, offset=10)}", ""]
        parts = [self._docstring(), self._imports(), *self.constants, "", self._build(), "", ""]
        if self._has_transform:
            parts += [self._transform(), "", ""]
        return "\n".join([*parts, self._pipeline()]) + "\n"

    @property
    def _not_finite_columns(self) -> list[str]:
        inputs = self.new.suggestion.inputs
        numbers = inputs["numbers"].columns if "numbers" in inputs else ()
        return [name for name in numbers if self.new.inspection.column(name).num_not_finite]

    @property
    def _has_transform(self) -> bool:
        return bool(self._not_finite_columns or self.new.target.classes)

    def _docstring(self) -> str:
        y, data = _quoted(self.new.target.column), _quoted(redacted(self.new.data))
        lines = [
            f'"""A model that predicts {y} in {data}, written by `raykeras new`.',
            f"\n    {self.new.command}\n",
            "It is a start: change the layers, the columns and the options as you like.",
        ]
        return "\n".join([*lines, '"""\n'])

    def _imports(self) -> str:
        numpy = "import numpy as np\n" if self._has_transform else ""
        return f"from __future__ import annotations\n\nfrom typing import Any\n\n{numpy}import raykeras as rk\n"

    def _add_numbers(self, name: str, columns: Sequence[Column]) -> None:
        moments = {column.name: _moments(self.new.inspection.samples[column.name].values) for column in columns}
        self.constants += [f"NUMBERS = {literal(moments, indent=0, offset=10)}"]
        self.constants += ['"""Mean and standard deviation of columns, in a sample of the rows."""', ""]
        self.inputs.append(f'"{name}": keras.Input(({len(columns)},), name="{name}"),')
        self.layers += [
            "means, deviations = zip(*NUMBERS.values(), strict=True)",
            "variances = [deviation**2 for deviation in deviations]",
            f'branches.append(layers.Normalization(mean=means, variance=variances)(inputs["{name}"]))',
        ]

    def _add_lookup(self, name: str, columns: Sequence[Column]) -> None:
        (column,) = columns
        constant = f"{name.upper()}_VALUES"
        values = sorted(set(self.new.inspection.samples[column.name].values) - _RESERVED) or [""]
        is_text = column.field.kind == "string"
        self.constants += [f"{constant} = {literal(values, indent=0, offset=len(constant) + 3)}"]
        self.constants += [
            f'"""Values of {_quoted(column.name)} in a sample of the rows; others share an embedding."""',
            "",
        ]
        size = min(_MAX_EMBEDDING, math.ceil(len(values) ** 0.5) + 1)
        dtype, layer = ("string", "StringLookup") if is_text else ("int64", "IntegerLookup")
        self.inputs.append(f'"{name}": keras.Input((), name="{name}", dtype="{dtype}"),')
        self.layers += [
            f'x = layers.{layer}(vocabulary={constant})(inputs["{name}"])',
            f"branches.append(layers.Embedding(len({constant}) + 1, {size})(x))",
        ]

    def _add_tensor(self, name: str, columns: Sequence[Column]) -> None:
        (column,) = columns
        padded = self.new.suggestion.pad.get(column.name)
        shape = (padded,) if padded else column.field.shape
        self.inputs.append(f'"{name}": keras.Input({literal(shape)}, name="{name}"),')
        self.layers.append(f'x = inputs["{name}"]')
        if (largest := _largest(column)) not in (0, 1):
            self.layers.append(f"x = layers.Rescaling(1 / {largest})(x)")
        if column.kind.startswith("image") or (len(shape) == 2 and min(shape) >= 8):
            self.layers += _convolutions(shape)
        elif len(shape) > 1:
            self.layers.append("x = layers.Flatten()(x)")
        self.layers.append('branches.append(layers.Dense(64, activation="relu")(x))')

    def _build(self) -> str:
        target = self.new.target
        lines = ["import keras", "from keras import layers", "", "inputs = {"]
        lines += [f"    {line}" for line in self.inputs] + ["}", "branches = []", *self.layers]
        lines.append(f"x = {'layers.Concatenate()(branches)' if len(self.inputs) > 1 else 'branches[0]'}")
        lines += ['x = layers.Dense(64, activation="relu")(x)', *_last_layers(target)]
        lines += ["model = keras.Model(inputs, outputs)"]
        lines += [f'model.compile(optimizer="adam", loss="{target.loss}", metrics=["{target.metric}"])', "return model"]
        body = "\n".join(f"    {line}" if line else "" for line in lines)
        return f'def build() -> Any:\n    """Build and compile the model."""\n{body}'

    def _transform(self) -> str:
        lines = ["columns = dict(columns)"]
        if self._not_finite_columns:
            lines += [
                f"for name in {literal(self._not_finite_columns)}:",
                "    mean = NUMBERS[name][0]",
                "    columns[name] = np.where(np.isfinite(columns[name]), columns[name], mean)",
            ]
        if self.new.target.classes:
            y, is_text = literal(self.new.target.column), isinstance(self.new.target.classes[0], str)
            value = "value.decode()" if is_text else "int(value)"
            lines += [
                "indices = {value: index for index, value in enumerate(CLASSES)}",
                f"columns[{y}] = np.array([indices[{value}] for value in columns[{y}]])",
            ]
        what = ["finite numbers"] if self._not_finite_columns else []
        what += ["the index of each class"] if self.new.target.classes else []
        body = "\n".join(f"    {line}" for line in lines)
        return (
            "def convert(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:\n"
            f'    """Return the columns with {" and ".join(what)}."""\n{body}\n    return columns'
        )

    def _pipeline(self) -> str:
        default = "" if self.new.data_is_secret else f" = {literal(self.new.data)}"
        what = "Folder with `train/` and `test/`" if self.new.has_test else "The Parquet files"
        lines = [
            _signature(f"data: str{default}", "batch_size: int = 32, epochs: int = 10"),
            '    """Return the pipeline.',
            "",
            "    Args:",
            f"        data: {what}.",
            "        batch_size: Global batch size.",
            "        epochs: Number of epochs.",
            '    """',
            *self._left_out(),
            *self._columns(),
        ]
        splits = f'"batch_size": batch_size, "epochs": epochs{self._validation_split()}'
        if self.new.has_test:
            lines += ['    train, test = (rk.parquet(f"{data}/{part}", **columns) for part in ("train", "test"))']
            arguments = ["train=train", "validation=test", "test=test"]
        else:
            lines += ["    source = rk.parquet(data, **columns)"]
            arguments = ["train=source", "test=source"]
        lines += ["    return rk.Pipeline(", "        model=build,"]
        lines += [f"        {argument}," for argument in (*arguments, f"fit={{{splits}}}")]
        return "\n".join([*lines, "    )"])

    def _validation_split(self) -> str:
        is_possible = self.new.inspection.opened.num_rows >= 10 and not self.new.target.is_sorted
        return ', "validation_split": 0.2' if is_possible and not self.new.has_test else ""

    def _left_out(self) -> list[str]:
        lines = [
            f"    # Left out: {literal(name)} ({printable_line(reason)})"[:118]
            for name, reason in list(self.new.suggestion.left_out.items())[:20]
        ]
        if self.new.target.is_sorted and not self.new.has_test:
            lines.append("    # The rows are sorted by y. Shuffle them and write them again to use `validation_split`.")
        return lines

    def _columns(self) -> list[str]:
        suggestion = self.new.suggestion
        arguments = suggestion.arguments()
        arguments["x"] = {name: suggestion.spec_of(name) for name in suggestion.inputs}
        if self._has_transform:
            used = [column for model_input in suggestion.inputs.values() for column in model_input.columns]
            arguments["columns"] = [c for c in (*used, suggestion.y, suggestion.sample_weight) if c]
        lines = ["    columns: dict[str, Any] = {"]
        for name, value in arguments.items():
            is_numbers = name == "x" and "numbers" in value
            code = literal(
                {**value, "numbers": _Name("list(NUMBERS)")} if is_numbers else value, indent=8, offset=len(name) + 5
            )
            lines.append(f'        "{name}": {code},')
        if self._has_transform:
            lines.append('        "transform": convert,')
        return [*lines, "    }"]


def _signature(data: str, options: str) -> str:
    """Return the first line of the function `pipeline`, or several if it is long."""
    line = f"def pipeline({data}, {options}) -> rk.Pipeline:"
    return line if len(line) <= 120 else f"def pipeline(\n    {data}, {options}\n) -> rk.Pipeline:"


class _Name:
    """Code that `literal` keeps."""

    def __init__(self, code: str) -> None:
        self._code = code

    def __repr__(self) -> str:
        return self._code


def _quoted(name: str) -> str:
    """Return a name as it can appear in a docstring."""
    return literal(name).replace("\\", "/").replace('"', "'")


def _moments(values: Sequence[Any]) -> tuple[float, float]:
    """Return the mean and the standard deviation of finite values, which is 1 if it is 0."""
    numbers = np.array(values, np.float64)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return 0.0, 1.0
    return float(f"{numbers.mean():.6g}"), float(f"{numbers.std():.6g}") or 1.0


def _largest(column: Column) -> int:
    """Return what to divide a tensor by: its largest magnitude, rounded up."""
    if column.range is None:
        return 0
    largest = math.ceil(max(abs(float(limit)) for limit in column.range))
    return 255 if column.field.dtype == "uint8" and largest > 127 else largest


def _convolutions(shape: Sequence[int]) -> list[str]:
    height, width = shape[:2]
    lines = [] if len(shape) == 3 else [f"x = layers.Reshape(({height}, {width}, 1))(x)"]
    for filters in (16, 32):
        lines.append(f'x = layers.Conv2D({filters}, 3, padding="same", activation="relu")(x)')
        if min(height, width) >= 8:
            lines.append("x = layers.MaxPooling2D()(x)")
            height, width = height // 2, width // 2
    is_small = shape[0] * shape[1] <= _SMALL_IMAGE
    return [*lines, f"x = layers.{'Flatten' if is_small else 'GlobalAveragePooling2D'}()(x)"]


def _last_layers(target: Target) -> list[str]:
    if target.kind == "binary":
        return ['outputs = layers.Dense(1, activation="sigmoid")(x)']
    if target.kind == "classes":
        size = "len(CLASSES)" if target.classes else str(target.num_classes)
        return [f'outputs = layers.Dense({size}, activation="softmax")(x)']
    if target.shape:
        num_values = math.prod(target.shape)
        reshape = [f"outputs = layers.Reshape({literal(target.shape)})(outputs)"] if len(target.shape) > 1 else []
        return [f"outputs = layers.Dense({num_values})(x)", *reshape]
    scale = f"{target.deviation:.6g}, offset={target.mean:.6g}"
    return ["outputs = layers.Dense(1)(x)", f"outputs = layers.Rescaling({scale})(outputs)  # to the scale of y"]
