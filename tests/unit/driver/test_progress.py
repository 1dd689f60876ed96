"""Progress output: one line per epoch in a log, a bar on a terminal, nothing with `verbose=0`."""

from __future__ import annotations

import io

import pytest

from raykeras import OptionError
from raykeras.core import events
from raykeras.driver.progress import make_display

RUN = [
    events.RunStarted(
        params={"epochs": 2, "steps": 4, "num_rows": 1500, "batch_size": 32},
        workers=2,
        replicas=4,
        initial_epoch=0,
        path="runs/a",
    ),
    events.EpochStarted(epoch=0),
    events.BatchEnded(epoch=0, step=2, logs={"loss": 0.5}, rows_per_s=1000.0, data_wait=0.25),
    events.EpochEnded(
        epoch=0,
        step=4,
        logs={"accuracy": 0.75, "val_loss": 0.00012, "loss": 0.5},
        seconds=1.94,
        rows_per_s=12345.6,
        data_wait=0.031,
    ),
    events.WorkerFailed(rank=1, cause="killed", node="n", next="training continues from epoch 2, step 2"),
    events.RunRestarted(epoch=1, step=2, workers=1, attempt=1),
    events.CheckpointDamaged(path="c", cause="c/model.keras is damaged"),
    events.StorageFailed(cause="unavailable", retry_s=0.5),
    events.RunEnded(status="completed", logs={}),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(verbose: str | int, file: io.StringIO) -> str:
    display = make_display(verbose, file)
    for event in RUN:
        display(event)
    display.close()
    return file.getvalue()


def test_pipe_gets_one_line_per_epoch() -> None:
    assert shown("auto", io.StringIO()).splitlines() == [
        "2 workers × 2 replicas  1,500 rows, batch 32  runs/a",
        "Epoch 1/2: 4/4 - 1.9s - loss: 0.5000 - accuracy: 0.7500 - val_loss: 1.2000e-04 - 12,346 rows/s - data wait 3%",
        "the worker of rank 1 failed on n: killed; training continues from epoch 2, step 2",
        "1 worker resumed from epoch 2, step 2",
        "skipped a damaged checkpoint: c/model.keras is damaged",
        "could not write a checkpoint, retrying in 0.5 s: unavailable",
        "completed; checkpoints in runs/a/checkpoints",
    ]


def test_terminal_gets_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = shown("auto", Terminal())
    assert "1,000 rows/s - data wait 25%" in text
    assert "Epoch 1/2: 4/4 - 1.9s" in text


def test_verbose_zero_is_silent() -> None:
    assert shown(0, Terminal()) == ""


@pytest.mark.parametrize("verbose", [3, True, "loud"])
def test_invalid_verbose_is_refused(verbose: object) -> None:
    with pytest.raises(OptionError, match="`verbose` must be"):
        make_display(verbose)  # type: ignore[arg-type]
