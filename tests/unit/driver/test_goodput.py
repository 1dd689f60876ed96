"""Where the time of a run went."""

from __future__ import annotations

import pytest

from raykeras.core import events
from raykeras.core.events import Event
from raykeras.driver import goodput


def phase(name: str, time: float) -> Event:
    return events.PhaseStarted(phase=name, time=time)


def start(time: float, *, epoch: int = 0, step: int = 0) -> Event:
    return events.RunStarted(
        params={}, workers=1, replicas=1, path="", initial_epoch=epoch, initial_step=step, time=time
    )


def batches(epoch: int, step: int, time: float, wait_s: float = 0.0) -> Event:
    return events.BatchEnded(epoch=epoch, step=step, logs={}, wait_s=wait_s, time=time)


FIRST_EPOCH = [
    phase("metadata", 100),
    phase("cluster", 101),
    phase("workers", 103),
    phase("build", 106),
    start(107),
    phase("compile", 107),
    events.EpochStarted(epoch=0, step=0, time=108),
    phase("train", 110),
    batches(0, 1, 110),
    batches(0, 11, 120, wait_s=2),
    events.ValidationEnded(epoch=0, step=11, logs={}, seconds=3, time=123),
    events.EpochEnded(epoch=0, step=11, logs={}, time=124),
    events.CheckpointSaved(epoch=0, step=11, path="", seconds=0.5, resumed=124, time=126),
]


def seconds(log: list[Event]) -> dict[str, float]:
    timeline = goodput.Timeline()
    for event in log:
        timeline(event)
    return {name: round(value, 6) for name, value in timeline.seconds().items() if value}


def test_undisturbed_run_is_split_by_what_it_did() -> None:
    log = [*FIRST_EPOCH, events.RunEnded(status="completed", logs={}, time=125)]
    expected = {"start": 6, "build": 4, "steps": 8, "data_wait": 2, "validation": 3, "checkpoints": 0.5, "other": 1.5}
    assert seconds(log) == expected


def test_checkpoint_counts_before_the_next_step_ends() -> None:
    log = [
        *FIRST_EPOCH[:-1],
        events.CheckpointSaved(epoch=0, step=11, path="", seconds=1, resumed=125, time=125.5),
        events.RunEnded(status="completed", logs={}, time=126),
    ]
    assert seconds(log)["checkpoints"] == 1
    assert sum(seconds(log).values()) == 26


def test_spans_of_frequent_batches_are_merged() -> None:
    timeline = goodput.Timeline()
    for event in FIRST_EPOCH[:8]:
        timeline(event)
    num_spans = len(timeline.spans)
    for step in range(100):
        timeline(batches(0, step + 1, 110 + step / 50, wait_s=0.01))
    timeline(events.RunEnded(status="completed", logs={}, time=112))
    assert len(timeline.spans) - num_spans <= 6
    assert timeline.seconds()["data_wait"] == pytest.approx(1.0)


def test_work_after_the_checkpoint_of_a_failure_is_lost() -> None:
    log = [
        *FIRST_EPOCH,
        events.EpochStarted(epoch=1, step=0, time=124),
        batches(1, 10, 134),
        batches(1, 20, 144),
        events.WorkerFailed(cause="", node="", time=147),
        phase("workers", 148),
        phase("build", 149),
        events.RunRestarted(epoch=1, step=15, workers=1, attempt=1, time=150),
        phase("compile", 150),
        phase("train", 152),
        batches(1, 16, 152),
        batches(1, 30, 160),
        events.RunEnded(status="completed", logs={}, time=160),
    ]
    spent = seconds(log)
    assert spent["steps"] == 8 + 15 + 8
    assert spent["lost"] == 5 + 3  # half of the steps from 10 to 20, and those that the failure interrupted
    assert spent["restart"] == 5
    assert sum(spent.values()) == 60


def test_time_between_a_killed_driver_and_the_next_call_does_not_count() -> None:
    log = [
        *FIRST_EPOCH,
        events.EpochStarted(epoch=1, step=0, time=124),
        batches(1, 10, 134),
        phase("metadata", 1000),
        phase("build", 1001),
        start(1002, epoch=1),
        phase("compile", 1002),
        events.EpochStarted(epoch=1, step=0, time=1002),
        phase("train", 1003),
        batches(1, 10, 1010),
        events.RunEnded(status="completed", logs={}, time=1010),
    ]
    spent = seconds(log)
    assert spent["lost"] == 10
    assert spent["steps"] == 8 + 7
    assert spent["start"] == 6 + 1
    assert sum(spent.values()) == 34 + 10


def test_growing_to_more_workers_counts_as_restart() -> None:
    log = [
        *FIRST_EPOCH,
        phase("workers", 124),
        events.WorldResized(workers=2, before=1, time=125),
        phase("build", 126),
        events.RunRestarted(epoch=1, step=0, workers=2, attempt=1, time=127),
        phase("compile", 127),
        events.EpochStarted(epoch=1, step=0, time=128),
        phase("train", 130),
        events.RunEnded(status="completed", logs={}, time=140),
    ]
    spent = seconds(log)
    assert spent["restart"] == 6
    assert "lost" not in spent


def test_clocks_that_differ_leave_no_negative_spans() -> None:
    log = [*FIRST_EPOCH, events.EpochStarted(epoch=1, step=0, time=90), batches(1, 5, 91)]
    assert sum(seconds(log).values()) == 24


def test_summary_names_the_largest_buckets() -> None:
    spent = dict.fromkeys(goodput.BUCKETS, 0.0) | {"steps": 600.0, "start": 25.0, "build": 99.0, "lost": 1.0}
    assert goodput.summary(spent) == "83% of 12 min 5 s in training steps (build 14%, start 3%)"


@pytest.mark.parametrize(("value", "text"), [(9.52, "9.5 s"), (59.96, "1 min 0 s"), (12000.0, "3 h 20 min")])
def test_durations_in_words(value: float, text: str) -> None:
    assert goodput.duration(value) == text
