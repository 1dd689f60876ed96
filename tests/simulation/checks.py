"""What must be true at the end of a simulated run."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

from raykeras.core import events
from raykeras.core.events import Event
from tests.simulation.training import undisturbed

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation


def check(simulation: Simulation) -> None:
    """Check the result, the checkpoints and the events of a run that has completed."""
    assert not simulation.scheduler.errors, f"a thread ended with {simulation.scheduler.errors[0]!r}"
    assert not simulation.violations, simulation.violations[0]
    check_result(simulation)
    check_checkpoints(simulation)
    for call in simulation.calls:
        check_events(call.handled, simulation.scenario.data.num_steps)
    is_consistent = not simulation.scenario.storage.listing_delay_s
    if is_consistent and len(simulation.calls) == 1:
        check_lost_work(simulation.calls[0].handled)
    check_log(simulation)


def check_result(simulation: Simulation) -> None:
    """The history of each call that trained to the end is that of an undisturbed run."""
    _, losses = _undisturbed(simulation)
    for call in simulation.calls:
        if call.outcome is not None and call.is_completed:
            assert call.outcome.epoch == list(range(simulation.scenario.epochs)), call.outcome.epoch
            assert call.outcome.history == {"loss": list(losses)}, (call.outcome.history, losses)


def check_checkpoints(simulation: Simulation) -> None:
    """The last checkpoint is whole, and each one that looks whole holds the state of an undisturbed run."""
    objects, data = simulation.store.objects, simulation.scenario.data
    weights, _ = _undisturbed(simulation)
    folders = {path.rpartition("/")[0] for path in objects if path.startswith("runs/run/checkpoints/")}
    whole = []
    for folder in sorted(folders):
        try:
            state = json.loads(objects[f"{folder}/train_state.json"])
            is_whole = all(_matches(objects.get(f"{folder}/{name}"), file) for name, file in state["files"].items())
        except (KeyError, ValueError):
            continue
        if is_whole:
            whole.append((state["epoch"], state["step"]))
            step = state["epoch"] * data.num_steps + state["step"]
            assert int(objects[f"{folder}/model.keras"]) == weights[step], f"{folder} holds another state"
    assert max(whole, default=None) == (simulation.scenario.epochs, 0), f"the last checkpoint is not whole: {whole}"


def check_mark(simulation: Simulation, path: str) -> None:
    """A checkpoint is marked as complete only once its files are."""
    folder, _, name = path.rpartition("/")
    if name != "train_state.json":
        return
    objects = simulation.store.objects
    try:
        files = json.loads(objects[path])["files"]
    except ValueError:  # the first part of the file
        return
    for name, file in files.items():
        if not _matches(objects.get(f"{folder}/{name}"), file):
            simulation.violations.append(f"{folder} is marked as complete without its {name}")


def check_events(handled: list[Event], num_steps: int) -> None:
    """The chief's events are complete and in order; after a restart, from its position on."""
    position: tuple[int, int] | None = None
    num_ended = attempt = 0
    for event in handled:
        if isinstance(event, events.RunStarted):
            assert position is None, "a run started twice"
            position, num_ended = (event.initial_epoch, event.initial_step), event.initial_epoch
        elif isinstance(event, events.RunRestarted):
            assert position is not None, "a run restarted before it started"
            position = event.epoch or 0, event.step or 0
            assert num_ended >= position[0], f"epoch {num_ended} never ended"
            assert event.attempt > attempt, f"{event} after attempt {attempt}"
            attempt = event.attempt
            num_ended = position[0]
        elif isinstance(event, events.BatchEnded):
            assert position is not None
            expected = position[0], position[1] + event.num_steps
            assert (event.epoch, event.step) == expected, f"{event} does not follow {position}"
            position = expected
        elif isinstance(event, events.EpochEnded):
            assert event.epoch == num_ended, f"{event} follows epoch {num_ended - 1}"
            num_ended += 1
            if event.step is not None:  # otherwise the worker was lost with the event
                assert position == (event.epoch, num_steps), f"{event} does not follow {position}"
                position = num_ended, 0
    ends = [event for event in handled if isinstance(event, events.RunEnded)]
    assert handled[len(handled) - len(ends) :] == ends and len(ends) <= 1, "a run ended twice, or went on"
    if ends and ends[0].status == "completed":
        assert position is None or num_ended >= position[0]


def check_lost_work(handled: list[Event]) -> None:
    """No restart goes back behind a checkpoint that was reported as saved."""
    saved = (0, 0)
    for event in handled:
        if isinstance(event, events.CheckpointSaved):
            assert event.epoch is not None
            saved = max(saved, (event.epoch, event.step) if event.step else (event.epoch + 1, 0))
        elif isinstance(event, events.RunRestarted):
            position = event.epoch or 0, event.step or 0
            assert position >= saved, f"{event} goes back behind {saved}"


def check_log(simulation: Simulation) -> None:
    """The stored log ends with the end of the run, and `history.csv` has each epoch once."""
    rows = simulation.store.objects["runs/run/history.csv"].decode().split()
    assert [row.split(",")[0] for row in rows] == ["epoch", *map(str, range(simulation.scenario.epochs))], (
        f"history.csv: {rows}"
    )
    lines = simulation.events_in_log()
    assert lines[-1]["event"] == "RunEnded" and lines[-1]["status"] == "completed", f"the log ends with {lines[-1]}"


def _matches(data: bytes | None, file: dict[str, Any]) -> bool:
    return data is not None and len(data) == file["size"] and f"{zlib.crc32(data):08x}" == file["crc32"]


def _undisturbed(simulation: Simulation) -> tuple[tuple[int, ...], tuple[float, ...]]:
    data = simulation.scenario.data
    return undisturbed(data.num_rows, data.batch_size, simulation.scenario.epochs)
