"""Plan a pipeline for data: the inputs and the loss of a small Keras model that fits its columns."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec

import raykeras as rk
from raykeras.cli.target import Target, target_of
from raykeras.core.errors import ColumnError, OptionError, printable_line, redacted
from raykeras.data.inspection import Inspection, inspect_source
from raykeras.data.sources.base import join_names
from raykeras.data.suggestion import Suggestion, suggest


@dataclass(frozen=True)
class NewPipeline:
    """A pipeline file, before it is written.

    Attributes:
        path: Where to write it.
        data: The data, as the user named it.
        has_test: Whether `data` has the folders `train` and `test`.
        inspection: What the training data contains.
        suggestion: The inputs of the model.
        target: What it predicts.
    """

    path: Path
    data: str
    has_test: bool
    inspection: Inspection
    suggestion: Suggestion
    target: Target

    @property
    def command(self) -> str:
        """The command that trains the model."""
        needs_data = " -s data=URL" if self.data_is_secret else ""
        return f"raykeras fit {shlex.quote(str(self.path))}{needs_data}"

    @property
    def data_is_secret(self) -> bool:
        """Whether the URL of the data contains credentials, which the file should not."""
        return redacted(self.data) != self.data

    def summary(self) -> list[str]:
        """Return lines that say what was written, and the next command."""
        left_out = self.suggestion.left_out
        lines = [
            f"{self.path}: predicts {self.target.column} from {join_names(self._input_words())}",
            f"loss {self.target.loss}, metric {self.target.metric}",
        ]
        if left_out:
            lines.append(f"left out: {join_names(left_out)}; the file says why")
        lines += ["", "next:", f"    {self.command}"]
        return [printable_line(line) for line in lines]

    def _input_words(self) -> list[str]:
        words = []
        for model_input in self.suggestion.inputs.values():
            number = len(model_input.columns)
            what = f"{number} {'column' if number == 1 else 'columns'} of numbers"
            words.append(what if model_input.kind == "numbers" else model_input.columns[0])
        return words


def plan_pipeline(name: str, data: str, *, x: Sequence[str], y: str | None, categories: Sequence[str]) -> NewPipeline:
    """Inspect data and choose the inputs and the loss of a model.

    Args:
        name: Path of the file; ".py" is appended if it has no suffix.
        data: A Parquet file, folder, glob or URL. Of a folder with `train` and `test`, the first is used for training.
        x: The columns to use as inputs; all suitable ones if empty.
        y: The column to predict; None for the one whose name says so, or else the last one.
        categories: Columns of integers that are categories.

    Raises:
        OptionError: If the file exists or is not a Python file.
        SourceError: If the data cannot be read.
        ColumnError: If there is no input or no column to predict, or a column cannot be used.
    """
    path = Path(name if Path(name).suffix else f"{name}.py")
    if path.suffix != ".py" or not str(path).isprintable() or {'"', "\\"} & set(str(path)):
        raise OptionError(f"A pipeline is a Python file; got {name!r}. Try `raykeras new pipeline.py`.")
    if path.exists():
        raise OptionError(f"`raykeras new` overwrites no file; {str(path)!r} exists. Choose another name.")
    if data.endswith((".npy", ".npz")):
        raise OptionError(f"`raykeras new` reads Parquet; got {data!r}. See pipelines/mnist.py for NumPy files.")
    has_test = _has_train_and_test(data)
    inspection = inspect_source(rk.parquet(f"{data.rstrip('/')}/train" if has_test else data))
    suggestion = suggest(inspection, x=x, y=y, categories=categories)
    if suggestion.y is None:
        raise ColumnError("A model needs a column to predict; this data has none that is suitable. Name it with `--y`.")
    if not suggestion.inputs:
        reasons = ", ".join(f"{name!r}: {reason}" for name, reason in list(suggestion.left_out.items())[:5])
        raise ColumnError(f"A model needs at least one input column; this data has none that is suitable ({reasons}).")
    return NewPipeline(path, data, has_test, inspection, suggestion, target_of(inspection, suggestion.y))


def write_new(path: Path, text: str) -> None:
    """Write a file that does not exist; its folder is created.

    Raises:
        OptionError: If the file exists or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OptionError(
            f"`raykeras new` writes a new file; {str(path)!r} cannot be written: {error.strerror}. Choose another name."
        ) from None


def _has_train_and_test(data: str) -> bool:
    if any(c in data for c in "*?["):
        return False
    fs, path = fsspec.core.url_to_fs(data)
    return all(fs.isdir(f"{path.rstrip('/')}/{part}") for part in ("train", "test"))
