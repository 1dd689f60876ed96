"""Wrong calls raise a message of a few lines, the last of which says what to do."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest

import raykeras as rk
from raykeras.core.tracebacks import PACKAGE_FOLDER
from tests.support.models import TWO, X, Y

MAX_LINES = 15
NAMES = [f"f{i}" for i in range(8)]


def build(units: int = 3, shape: Any = (8,), loss: Any = "sparse_categorical_crossentropy") -> Callable[[], Any]:
    def make() -> Any:
        inputs = keras.Input(shape, name="features")
        model = keras.Model(inputs, keras.layers.Dense(units, activation="softmax", name="label")(inputs))
        if loss is not None:
            model.compile("sgd", loss)
        return model

    return make


class Raises(keras.callbacks.Callback):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        open("/nowhere/log.txt")  # noqa: SIM115


def failing_loss(y: Any, predicted: Any) -> Any:
    return y["label"]


def divide_by_zero(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    return {**columns, "f0": columns["f0"] + 1 // 0}


def make_objects(columns: dict[str, np.ndarray]) -> dict[str, Any]:
    return {**columns, "f0": np.array([[1], [2, 3]] * len(columns["f0"]), object)[: len(columns["f0"])]}


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A Parquet file with eight features, a label, a city and labels out of range."""
    frame = pd.DataFrame(X, columns=NAMES).assign(label=Y, shifted=Y + 2, city="Bern", partly=Y)
    frame.loc[40, "partly"] = None
    frame.to_parquet(tmp_path / "table.parquet", row_group_size=25)
    return str(tmp_path / "table.parquet")


Call = Callable[[str, dict[str, Any]], Any]
"""Called with the path of the table and the options of a run."""

CALLS: dict[str, Call] = {
    "model not compiled": lambda path, run: rk.fit(build(loss=None), X, Y, **run),
    "label out of range": lambda path, run: rk.fit(build(), X, Y + 2, **run),
    "label in a file out of range": lambda path, run: rk.fit(
        build(), rk.parquet(path, x=NAMES, y="shifted", cache=None), **run
    ),
    "text in a numeric input": lambda path, run: rk.fit(build(), X.astype(str), Y, **run),
    "text among numeric columns": lambda path, run: rk.fit(
        build(), rk.parquet(path, x=["f0", "city"], y="label"), **run
    ),
    "text as labels": lambda path, run: rk.fit(build(), rk.parquet(path, x=NAMES, y="city"), **run),
    "wrong shape": lambda path, run: rk.fit(build(), X[:, :5], Y, **run),
    "wrong shape of the validation data": lambda path, run: rk.fit(build(), X, Y, validation_data=(X[:, :5], Y), **run),
    "no such column": lambda path, run: rk.fit(build(), rk.parquet(path, x=[*NAMES[:7], "f8"], y="label"), **run),
    "nulls": lambda path, run: rk.fit(build(), rk.parquet(path, x=NAMES, y="partly"), **run),
    "no such output": lambda path, run: rk.fit(build(), X, {"lable": Y}, **run),
    "class weights as a list": lambda path, run: rk.fit(build(), X, Y, class_weight=[1.0, 2.0, 1.0], **run),
    "failing transform": lambda path, run: rk.fit(
        build(), rk.parquet(path, x=NAMES, y="label", transform=divide_by_zero), **run
    ),
    "objects from a transform": lambda path, run: rk.fit(
        build(), rk.parquet(path, x=NAMES, y="label", transform=make_objects), **run
    ),
    "failing callback": lambda path, run: rk.fit(build(), X, Y, callbacks=[Raises()], **run),
    "failing loss": lambda path, run: rk.fit(build(loss=failing_loss), X, Y, **run),
    "infinite weight": lambda path, run: rk.fit(build(), X, Y, sample_weight=np.full(75, np.inf), **run),
    "path instead of a source": lambda path, run: rk.fit(build(), str(Path(path).parent), **run),
    "number as scale": lambda path, run: rk.fit(build(), X, Y, **{**run, "scale": 2}),
    "text as run": lambda path, run: rk.fit(build(), X, Y, **{**run, "run": "first"}),
    "misspelled monitor": lambda path, run: rk.fit(
        build(), X, Y, **{**run, "run": rk.Run(storage=run["run"].storage, monitor="lose")}
    ),
    "storage that cannot be written": lambda path, run: rk.fit(
        build(), X, Y, **{**run, "run": rk.Run(storage="/proc/runs")}
    ),
    "batch size of zero": lambda path, run: rk.fit(build(), X, Y, batch_size=0, **run),
    "no such model file": lambda path, run: rk.evaluate("/nowhere/model.keras", X, Y, scale=run["scale"]),
    "fewer labels than rows": lambda path, run: rk.fit(build(), X, Y[:70], **run),
    "infinite class": lambda path, run: rk.fit(build(), X, np.full(75, np.inf), class_weight={1: 2.0}, **run),
}
ON_TWO_WORKERS = [
    "model not compiled",
    "label out of range",
    "label in a file out of range",
    "text in a numeric input",
    "wrong shape of the validation data",
    "no such output",
    "failing transform",
    "objects from a transform",
    "failing callback",
    "failing loss",
]


def shown(call: Call, path: str, run: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines that a script would end with on the console."""
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        try:
            call(path, run)
        except Exception:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    for warning in warned:
        if warning.filename.startswith(PACKAGE_FOLDER):
            print(warnings.formatwarning(warning.message, UserWarning, warning.filename, 1), file=sys.stderr)
    return [line for line in capfd.readouterr().err.splitlines() if line.strip()]


@pytest.mark.parametrize("name", CALLS)
def test_wrong_call_in_one_process_has_short_message(
    name: str, table: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = {"scale": rk.Scale(), "run": rk.Run(storage=str(tmp_path)), "verbose": 0}
    lines = shown(CALLS[name], table, run, capfd)
    print(*lines, sep="\n")
    assert 1 < len(lines) <= MAX_LINES
    assert not [line for line in lines if line.lstrip().startswith(f'File "{PACKAGE_FOLDER}')]


def test_text_labels_are_refused(table: str, tmp_path: Path) -> None:
    run: dict[str, Any] = {"run": rk.Run(storage=str(tmp_path)), "verbose": 0}
    with pytest.raises(rk.ModelError, match=r"labels; 'city' holds text\. .* columns\['city'\]"):
        rk.fit(build(), rk.parquet(table, x=NAMES, y="city"), **run)
    with pytest.raises(rk.ModelError, match="labels; 'y' holds text"):
        rk.fit(build(loss={"label": keras.losses.SparseCategoricalCrossentropy()}), X, Y.astype(str), **run)


def test_model_that_cannot_be_pickled_is_refused(tmp_path: Path) -> None:
    numbers = (number for number in range(3))

    def make() -> Any:
        return build(next(numbers))()

    with pytest.raises(rk.ModelError, match=r"must be picklable; got TypeError: cannot pickle 'generator' object"):
        rk.fit(make, X, Y, scale=TWO, run=rk.Run(storage=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ON_TWO_WORKERS)
def test_wrong_call_on_two_workers_has_short_message(
    name: str, table: str, kept_workers: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = {"scale": TWO, "run": rk.Run(storage=str(tmp_path)), "verbose": 0}
    lines = shown(CALLS[name], table, run, capfd)
    print(*lines, sep="\n")
    assert 1 < len(lines) <= MAX_LINES
    assert not [line for line in lines if line.lstrip().startswith(f'File "{PACKAGE_FOLDER}')]
