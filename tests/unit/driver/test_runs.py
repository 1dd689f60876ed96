"""Runs read from their folders: results, lists, followed while they grow, and files that anyone may have written."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import raykeras as rk
from raykeras.checkpoint.store import RunFolder
from raykeras.core import events
from raykeras.core.events import Event
from raykeras.driver.progress import make_display
from raykeras.driver.record import parse_record
from raykeras.driver.run_state import RunState
from raykeras.driver.runs import StoredRun
from raykeras.driver.screen import live_lines
from raykeras.driver.stored_events import parse_events
from tests.unit.driver.test_progress import RUN

BEGUN = time.time() - 3600


def run_of(losses: list[float], start: float = BEGUN, status: str = "completed") -> Iterator[Event]:
    """Yield the events of a run with an epoch per loss, of 10 s each."""
    yield events.PhaseStarted(phase="metadata", time=start)
    params = {"epochs": len(losses), "steps": 4, "validation": True}
    yield events.RunStarted(params=params, workers=1, replicas=1, initial_epoch=0, path="runs/a", time=start + 1)
    for epoch, loss in enumerate(losses):
        at = start + 10 * epoch
        yield events.EpochStarted(epoch=epoch, step=0, time=at + 2)
        yield events.PhaseStarted(phase="train", epoch=epoch, step=1, time=at + 3)
        yield events.BatchEnded(epoch=epoch, step=4, logs={"loss": loss}, num_steps=4, time=at + 8)
        logs = {"loss": loss, "val_loss": loss, "f1": np.array([loss, 1.0])}
        yield events.EpochEnded(epoch=epoch, step=4, logs=logs, seconds=8, time=at + 10)
    if status:
        yield events.RunEnded(status=status, logs={}, time=start + 10 * len(losses) + 1)


def write(folder: Path, log: Iterator[Event] | list[Event], record: dict[str, Any] | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    RunFolder(str(folder)).claim("a driver")
    lines = [json.dumps(event.as_dict()) + "\n" for event in log]
    (folder / "events.jsonl").write_text("".join(lines))
    (folder / "run.json").write_text(json.dumps(record or {}))
    return str(folder)


def test_run_is_opened_as_result(tmp_path: Path) -> None:
    result = rk.open_run(write(tmp_path / "a", run_of([0.5, 0.2, 0.4])))
    assert result.history["loss"] == [0.5, 0.2, 0.4] and result.epoch == [0, 1, 2]
    np.testing.assert_array_equal(result.history["f1"][1], [0.2, 1.0])
    assert result.params["steps"] == 4
    assert result.checkpoints == []
    assert sum(result.goodput.values()) == pytest.approx(31)
    assert result.goodput["steps"] == pytest.approx(23)
    assert "<td>3</td><td>0.4000</td>" in result._repr_html_()


def test_runs_are_listed_oldest_first(tmp_path: Path) -> None:
    write(tmp_path / "b", run_of([0.5, 0.2, 0.4]), {"calls": [{"arguments": {"run": {"monitor": "loss"}}}]})
    write(tmp_path / "a", run_of([0.3], BEGUN + 100, status=""))
    write(tmp_path / "c", run_of([0.3], BEGUN + 200, status="failed"))
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").write_text("")
    found = rk.runs(str(tmp_path))
    assert [(run.name, run.status, run.epochs) for run in found] == [
        *(("b", "completed", 3), ("a", "running", 1), ("c", "failed", 1)),
    ]
    assert found[0].path == str(tmp_path / "b")
    assert (found[0].monitor, found[0].best_epoch, found[0].best_logs["loss"]) == ("loss", 1, 0.2)
    assert found[0].logs["loss"] == 0.4 and found[0].seconds == pytest.approx(31)
    shown = found._repr_html_().replace(' style="text-align: left"', "")  # type: ignore[attr-defined]
    assert "<td>b</td><td>completed</td><td>3/3</td><td>loss 0.4000</td><td>0.2000 (2)</td>" in shown
    assert rk.runs(str(tmp_path / "none")) == []


def test_folder_without_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(rk.OptionError, match="which holds no run"):
        rk.open_run(str(tmp_path))


@pytest.mark.parametrize("num_bytes", [1, 1000])
def test_growing_log_is_followed_to_its_end(tmp_path: Path, num_bytes: int) -> None:
    log = [*run_of([0.5], status="interrupted"), *run_of([0.5, 0.2], BEGUN + 100)]
    path = Path(write(tmp_path / "a", log), "events.jsonl")
    data = path.read_bytes()
    written = len(data.splitlines(keepends=True)[0])
    path.write_bytes(data[:written])
    seen: list[Event] = []

    def grow() -> None:
        nonlocal written
        # the interrupted call is resumed before it is read
        written = max(written + num_bytes, data.index(b"RunEnded") + 400)
        path.write_bytes(data[:written])

    StoredRun(str(tmp_path / "a")).follow(seen.append, grow)
    assert [event.as_dict() for event in seen] == [event.as_dict() for event in log]


def test_end_of_run_ends_the_following(tmp_path: Path) -> None:
    seen: list[Event] = []
    StoredRun(write(tmp_path / "a", run_of([0.5]))).follow(seen.append, lambda: pytest.fail("waits"))
    assert seen[-1].kind == "RunEnded"


MUTATIONS = [None, True, -1, 1 << 70, 10**400, 0.5, 1e308, float("nan"), "", "\x1b[2J", [], {}, [[]], {"": None}]


@given(data=st.data())
@settings(max_examples=500)
def test_tampered_log_is_shown_without_failure(data: st.DataObject) -> None:
    lines = [json.loads(json.dumps(event.as_dict())) for event in [*RUN[:4], *run_of([0.5, 0.2]), *RUN[4:]]]
    for _ in range(data.draw(st.integers(1, 6))):
        line = data.draw(st.sampled_from(lines))
        name = data.draw(st.sampled_from(sorted(line)))
        target = line
        if isinstance(line[name], dict) and line[name] and data.draw(st.booleans()):
            target, name = line[name], data.draw(st.sampled_from(sorted(line[name])))
        target[name] = copy.deepcopy(data.draw(st.sampled_from(MUTATIONS)))
    lines = data.draw(st.permutations(lines)) if data.draw(st.booleans()) else lines
    state, display = RunState(), make_display(0)
    for event in parse_events("\n".join(json.dumps(line) for line in lines)):
        state(event)
        display(event)
        assert all("\x1b" not in line or "[2J" in line for line in live_lines(state, 80))
    assert all(seconds >= 0 for seconds in state.timeline.seconds().values())


@given(text=st.text(max_size=300) | st.binary(max_size=300).map(lambda data: data.decode(errors="replace")))
def test_arbitrary_text_is_no_log_and_no_record(text: str) -> None:
    assert all(isinstance(event, Event) for event in parse_events(text))
    assert set(parse_record(text)) <= {"calls", "model"}


@pytest.mark.parametrize("text", ["[]", "{", '{"calls": 3}', '{"calls": [3]}', "[" * 100_000, '{"model": []}'])
def test_invalid_records_are_empty(text: str) -> None:
    assert not any(parse_record(text).values())


@pytest.mark.parametrize("monitor", [None, 3, "loss", ["loss"]])
def test_monitor_of_tampered_record(tmp_path: Path, monitor: Any) -> None:
    for record in ({"calls": [{"arguments": {"run": {"monitor": monitor}}}]}, {"calls": [{"arguments": monitor}]}):
        run = StoredRun(write(tmp_path / "a", [], record))
        assert run.state.monitor in ("loss", "val_loss")
