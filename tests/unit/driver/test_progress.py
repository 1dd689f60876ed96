"""Progress output: one line per epoch in a log, live lines on a terminal, HTML in a notebook, nothing if silent."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest

from raykeras import OptionError
from raykeras.core import events
from raykeras.core.events import Event
from raykeras.driver.notebook import NotebookDisplay, epochs_tables
from raykeras.driver.progress import EarlyEvents, make_display
from raykeras.driver.run_state import RunState
from raykeras.driver.screen import live_lines, metric_texts, wrapped

SCREENS = Path(__file__).parent / "screens"
NOW = 10_000.0
METRICS = ["loss", "accuracy", "precision", "recall", "auc", "score_loss", "score_mae", "class_loss", "f1", "top_5"]


def phase(name: str, at: float) -> Event:
    return events.PhaseStarted(phase=name, time=at)


def started(**params: object) -> Event:
    params = {"epochs": 2, "steps": 4, "num_rows": 1500, "batch_size": 32, "validation": True, **params}
    return events.RunStarted(params=params, workers=2, replicas=4, initial_epoch=0, path="runs/a", time=103)


RUN = [
    phase("metadata", 100),
    phase("build", 101),
    started(),
    phase("compile", 103),
    events.EpochStarted(epoch=0, time=104),
    phase("train", 106),
    events.BatchEnded(epoch=0, step=2, logs={"loss": 0.5}, rows_per_s=1000.0, data_wait=0.25, wait_s=1, time=108),
    events.EpochEnded(
        epoch=0,
        step=4,
        logs={"accuracy": 0.75, "val_loss": 0.00012, "loss": 0.5},
        seconds=1.94,
        rows_per_s=12345.6,
        data_wait=0.031,
        time=110,
    ),
    events.WorkerFailed(rank=1, cause="killed", node="n", next="training continues from epoch 2, step 2", time=111),
    events.RunRestarted(epoch=1, step=2, workers=1, attempt=1, time=112),
    events.CheckpointDamaged(path="c", cause="c/model.keras is damaged", time=112),
    events.StorageFailed(cause="unavailable", retry_s=0.5, time=112),
    events.RunEnded(status="completed", logs={}, time=120),
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


@pytest.mark.parametrize("verbose", ["auto", 1, 2])
def test_pipe_gets_one_line_per_epoch(verbose: str | int) -> None:
    assert shown(verbose, io.StringIO()).splitlines() == [
        "2 workers × 2 replicas  1,500 rows, batch 32  runs/a",
        "Epoch 1/2: 4/4 - 1.9s - loss: 0.5000 - accuracy: 0.7500 - val_loss: 1.2000e-04 - 12,346 rows/s - data wait 3%",
        "the worker of rank 1 failed on n: killed; training continues from epoch 2, step 2",
        "1 worker resumed from epoch 2, step 2",
        "skipped a damaged checkpoint: c/model.keras is damaged",
        "could not write a checkpoint, retrying in 0.5 s: unavailable",
        "completed; checkpoints in runs/a/checkpoints",
        "15% of 20.0 s in training steps (restart 45%, build 25%, start 5%, lost 5%, data wait 5%)",
    ]


def test_terminal_gets_live_lines_and_wrapped_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = shown("auto", Terminal())
    assert "reading metadata …" in text and "building the model …" in text
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").splitlines()
    epoch = lines.index("Epoch 1/2: 4/4 - 1.9s - loss: 0.5000 - accuracy: 0.7500 - val_loss: 1.2000e-04")
    assert lines[epoch + 1] == "           12,346 rows/s - data wait 3%"
    assert lines[-1] == "15% of 20.0 s in training steps (restart 45%, build 25%, start 5%, lost 5%, data wait 5%)"


def at_epoch_3(width: int) -> list[tuple[str, list[str]]]:
    """Return the live lines of a run with ten metrics at several times."""
    values = {name: 0.5 + 0.01 * index for index, name in enumerate(METRICS)}
    all_values = {**values, **{f"val_{name}": value + 0.1 for name, value in values.items()}}
    ended = {"seconds": 20.0, "learning_rate": 0.001, "logs": all_values, "step": 470}
    now = NOW
    run = [
        ("reading metadata", phase("metadata", now - 100)),
        ("", started(epochs=5, steps=470)),
        ("compiling", phase("compile", now - 90)),
        ("", events.EpochStarted(epoch=0, time=now - 90)),
        ("", events.PhaseStarted(phase="train", epoch=0, step=1, time=now - 80)),
        ("", events.EpochEnded(epoch=0, time=now - 70, **ended)),
        ("", events.CheckpointSaved(epoch=0, path="c", time=now - 65)),
        ("", events.EpochEnded(epoch=1, time=now - 50, **{**ended, "logs": {**all_values, "val_loss": 0.9}})),
        ("", events.RunRestarted(epoch=2, step=0, workers=2, attempt=1, time=now - 40)),
        ("", events.PhaseStarted(phase="train", epoch=2, step=1, time=now - 30)),
        ("", events.EpochStarted(epoch=2, time=now - 30)),
        ("step 123", events.BatchEnded(epoch=2, step=123, logs=values, rows_per_s=1300, data_wait=0.02, time=now - 25)),
        ("validating", events.BatchEnded(epoch=2, step=470, logs=values, rows_per_s=1300, time=now - 11)),
        ("validated", events.ValidationEnded(epoch=2, step=470, logs=values, seconds=2.0, time=now - 9)),
    ]
    state = RunState()
    screens = []
    for title, event in run:
        state(event)
        if title:
            screens.append((title, live_lines(state, width)))
    return screens


@pytest.mark.parametrize("width", [80, 120])
def test_live_screen_fits_ten_metrics(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: NOW)
    screens = at_epoch_3(width)
    text = "\n".join(line for title, lines in screens for line in (f"# {title}", *lines)) + "\n"
    assert max(map(len, text.splitlines())) <= width
    assert text == (SCREENS / f"live-{width}.txt").read_text()


def test_silent_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    state = RunState()
    for event in RUN[:7]:
        state(event)
    for seconds, is_shown in ((30, False), (125, True)):
        monkeypatch.setattr("time.time", lambda seconds=seconds: 108.0 + seconds)
        assert ("no event for 2 min 5 s" in live_lines(state, 80)[-1]) == is_shown


def test_unknown_number_of_steps_has_no_bar() -> None:
    state = RunState()
    for event in (*RUN[:2], started(steps=None), *RUN[3:7]):
        state(event)
    assert live_lines(state, 80)[0] == "Epoch 1/2: 2 steps - 1.0s/step"


def test_narrow_terminal_keeps_steps_and_time_left() -> None:
    state = RunState()
    for event in RUN[:7]:
        state(event)
    assert live_lines(state, 44)[0] == "Epoch 1/2: ━━── 2/4 - 1.0s/step - 2.0 s left"
    assert live_lines(state, 40)[0].startswith("Epoch 1/2: 2/4 - 1.0s/step - 2.0 s left")


def test_control_characters_and_credentials_are_not_shown() -> None:
    file = io.StringIO()
    display = make_display(2, file)
    display(started())
    display(events.EpochEnded(epoch=0, step=1, logs={"\x1b[2Jloss\u202e": 0.5}))
    display(events.WorkerFailed(node="n", cause="s3://me:secret@host/x\x07"))
    assert "secret" not in file.getvalue()
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", file.getvalue())


def test_metrics_with_several_values_show_the_first() -> None:
    assert metric_texts({"f1": np.arange(6.0)}) == ["f1: [0.0000 1.0000 2.0000 3.0000 …]"]


def test_long_texts_are_wrapped_between_items_only() -> None:
    assert wrapped(["a" * 10, "b", "c"], 8, indent="  ") == ["a" * 10, "  b - c"]
    assert wrapped([], 8) == []


def test_notebook_shows_table_of_epochs_and_escapes_names() -> None:
    pages: list[str] = []

    def show(page: str) -> object:
        pages.append(page)
        return pages.append

    display = NotebookDisplay("val_loss", show)  # type: ignore[arg-type]
    for event in RUN[:7]:
        display(event)
    display(events.EpochEnded(epoch=0, step=4, logs={"<b>": 0.5, "val_loss": 0.25}, seconds=2.0))
    display(RUN[-1])
    display.close()
    assert "reading metadata …" in pages[0]
    assert "2/4" not in pages[-1]
    assert "<th>&lt;b&gt;</th><th>val_loss</th><th>time</th>" in pages[-1]
    assert '<tr style="font-weight: bold"><td>1</td><td>0.5000</td><td>0.2500</td><td>2.0 s</td></tr>' in pages[-1]
    assert "completed; checkpoints in runs/a/checkpoints" in pages[-1]


def test_notebook_shows_many_metrics_in_two_tables() -> None:
    values = dict.fromkeys([*METRICS, *(f"val_{name}" for name in METRICS)], 0.5)
    training, validation = epochs_tables([0, 1], [values, values], best=1, seconds=[1.0, 2.0]).split("</table>")[:2]
    assert training.startswith("<table><tr><th>epoch</th><th>loss</th>") and "<th>top_5</th><th>time</th>" in training
    assert validation.startswith("<table><tr><th>epoch</th><th>val_loss</th>")
    assert validation.count("0.5000") == training.count("0.5000") == 2 * len(METRICS)


def test_early_events_are_shown_once() -> None:
    seen: list[Event] = []
    early = EarlyEvents(seen.append)
    early.begin("metadata")
    early.begin("cluster")
    for event in [*early.sent, *RUN[:2]]:
        early.show(event)
    assert [event.phase for event in seen if isinstance(event, events.PhaseStarted)] == [
        *("metadata", "cluster"),
        *("metadata", "build"),
    ]


def test_verbose_zero_is_silent() -> None:
    assert shown(0, Terminal()) == ""


@pytest.mark.parametrize("verbose", [3, True, "loud"])
def test_invalid_verbose_is_refused(verbose: object) -> None:
    with pytest.raises(OptionError, match="`verbose` must be"):
        make_display(verbose)  # type: ignore[arg-type]
