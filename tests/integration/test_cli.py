"""The command line: options and exit statuses."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import raykeras as rk
from raykeras.checkpoint.store import RunFolder
from raykeras.cli.main import main

DIGITS = Path(__file__).parents[2] / "pipelines" / "digits.py"


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr("raykeras.driver.fit.fit", lambda model, x, **options: made.append(options))
    return made


def test_fit_options_override_pipeline(calls: list[dict[str, Any]]) -> None:
    options = "--workers 2 --cpus-per-worker 0.5 --epochs 3 --batch-size 16 --verbose 0 --seed 7 --name a --keep 2"
    done = run("fit", DIGITS, *options.split(), "--checkpoint-every", "none", "--storage", "s")
    assert done.exit_code == 0, done.output
    (call,) = calls
    assert call["scale"] == rk.Scale(workers=2, cpus_per_worker=0.5)
    assert call["run"] == rk.Run(storage="s", name="a", seed=7, keep=2, checkpoint_every=None)
    assert (call["epochs"], call["batch_size"], call["verbose"]) == (3, 16, 0)


def test_resume_and_failure_options_are_passed_on(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    RunFolder(str(tmp_path / "runs" / "a")).make()
    RunFolder(str(tmp_path / "runs" / "a")).claim("a driver")
    options = "--workers 1-8 --checkpoint-every 10min --max-failures 5 --hang-timeout-s 60 --monitor loss"
    assert run("fit", DIGITS, *options.split(), "--resume", tmp_path / "runs" / "a").exit_code == 0
    again = run("fit", DIGITS, "--checkpoint-every", "500", "--resume", tmp_path / "runs/a/", "--weights-only")
    assert again.exit_code == 0
    first, second = calls
    assert first["scale"] == rk.Scale(workers=(1, 8)) and first["scale"].min_workers == 1
    named = {"storage": str(tmp_path / "runs"), "name": "a"}
    assert first["run"] == rk.Run(
        **named, checkpoint_every=timedelta(minutes=10), max_failures=5, hang_timeout_s=60, monitor="loss"
    )
    assert second["run"] == rk.Run(**named, checkpoint_every=500, resume="weights")
    none = run("fit", DIGITS, "--resume", tmp_path / "none")
    assert none.exit_code == 2 and "`--resume` takes the folder of a run" in none.output


def test_default_run_name_is_pipeline_and_time(calls: list[dict[str, Any]]) -> None:
    run("fit", DIGITS, "-s", "epochs=4")
    assert calls[0]["epochs"] == 4
    assert calls[0]["run"].name.startswith("digits-2")


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (rk.ColumnError("no such column"), 2, "raykeras: error: no such column"),
        (rk.ResourceError("too few GPUs"), 2, "raykeras: error: too few GPUs"),
        (rk.WorkerLostError("gone"), 1, "raykeras: error: gone"),
        (
            rk.UserCodeError("KeyError", rank=1, node="n", cause="KeyError", user_traceback="File user.py"),
            1,
            "File user.py",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_set_exit_status(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, shown: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("raykeras.driver.fit.fit", fails)
    done = run("fit", DIGITS)
    assert done.exit_code == status
    assert shown in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("def pipeline(:", "SyntaxError: invalid syntax"),
        ("def pipeline():\n    return {}['model']", "KeyError: 'model'"),
        ("import raykeras_has_no_such_module", "ModuleNotFoundError: No module named 'raykeras_has_no_such_module'"),
    ],
)
def test_error_in_pipeline_shows_frames_of_pipeline(tmp_path: Path, text: str, last: str) -> None:
    (tmp_path / "wrong.py").write_text(text)
    done = run("fit", tmp_path / "wrong.py")
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert lines[-1] == last
    assert all("wrong.py" in line for line in lines if line.lstrip().startswith("File"))


def test_invalid_options_are_usage_errors() -> None:
    assert run("fit", DIGITS, "--workers", "0").exit_code == 2
    assert "such as 1-8" in run("fit", DIGITS, "--workers", "two").output
    assert "must be key=value" in run("fit", DIGITS, "-s", "epochs").output
    assert run("fit", "no/such.py").exit_code == 2


def test_inspect_shows_columns_and_rows(tmp_path: Path) -> None:
    shown = run("inspect", DIGITS.parent / "digits" / "train").output
    assert "8×8" in shown
    assert "1,500 rows in 4 files" in shown
    np.savez(tmp_path / "a.npz", x=np.ones((3, 2)))
    assert "3 rows in 1 file" in run("inspect", tmp_path / "a.npz").output
    assert run("inspect", tmp_path / "none").exit_code == 2


def test_evaluate_and_predict_with_checkpoint(tmp_path: Path) -> None:
    done = run("fit", DIGITS, "-s", "epochs=1", "--storage", tmp_path, "--name", "run", "--verbose", "0")
    assert done.exit_code == 0, done.output
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch-000001"
    evaluated = run("evaluate", DIGITS, "--checkpoint", checkpoint)
    last = json.loads(evaluated.stdout.splitlines()[-1])
    history = (tmp_path / "run" / "history.csv").read_text().splitlines()
    validated = dict(zip(*(line.split(",") for line in history), strict=True))
    np.testing.assert_allclose(last["accuracy"], float(validated["val_accuracy"]), rtol=1e-6)
    predicted = run("predict", DIGITS, "--checkpoint", checkpoint, "--output", tmp_path / "out", "--column", "label")
    assert predicted.exit_code == 0, predicted.output
    table = pq.read_table(tmp_path / "out")
    assert table.column_names == ["prediction", "label"]
    classes = table["prediction"].combine_chunks().to_numpy_ndarray().argmax(1)
    np.testing.assert_allclose((classes == table["label"].to_numpy()).mean(), last["accuracy"], atol=0.01)


def test_missing_checkpoint_exits_with_1(tmp_path: Path) -> None:
    done = run("evaluate", DIGITS, "--checkpoint", tmp_path / "none")
    assert done.exit_code == 1
    assert "there is no" in done.stderr
