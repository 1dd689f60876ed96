"""What the figures of a report show, computed from events."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raykeras.core import events
from raykeras.driver import goodput
from raykeras.driver.goodput import Span
from raykeras.report import series
from raykeras.report.series import Curve, RunClock, WorkerTime


def started(time: float, *, epoch: int = 0, batch_size: int | None = 10) -> events.Event:
    params = {"batch_size": batch_size}
    return events.RunStarted(params=params, workers=2, replicas=2, path="", initial_epoch=epoch, time=time)


def batches(epoch: int, step: int, time: float, loss: float = 1.0, wait_s: float = 0.0) -> events.Event:
    return events.BatchEnded(epoch=epoch, step=step, logs={"loss": loss}, wait_s=wait_s, time=time)


def ended(epoch: int, rate: float | None = None, **logs: float) -> events.EpochEnded:
    return events.EpochEnded(epoch=epoch, logs=logs, learning_rate=rate)


LOG = [
    events.PhaseStarted(phase="metadata", time=1000),
    started(1002),
    events.EpochStarted(epoch=0, step=0, time=1002),
    events.PhaseStarted(phase="train", epoch=0, step=1, time=1004),
    batches(0, 11, 1009, loss=2.0, wait_s=1),
    batches(0, 21, 1014, loss=1.5),
    events.CheckpointSaved(epoch=0, step=15, path="", time=1014),
    events.WorkerFailed(rank=1, cause="It was killed.", node="b", time=1016),
    events.PhaseStarted(phase="workers", time=1016),
    events.RunRestarted(epoch=0, step=15, workers=1, attempt=1, time=1018),
    events.PhaseStarted(phase="train", epoch=0, step=16, time=1020),
    batches(0, 21, 1022.5, loss=1.4),
    # the driver is killed, and fit is called again after a hundred seconds
    events.PhaseStarted(phase="metadata", time=1122.5),
    started(1124.5, epoch=1),
    events.RunEnded(status="interrupted", logs={}, time=1125.5),
]
SPANS = goodput.spans(LOG)


def test_metrics_by_epoch_begin_with_the_losses() -> None:
    finished = {0: ended(0, acc=0.5, loss=2.0, val_loss=2.5), 1: ended(1, acc=0.6, loss=1.0, val_loss=math.nan)}
    assert series.metric_curves(finished) == {
        "loss": {"training": Curve([1, 2], [2.0, 1.0]), "validation": Curve([1, 2], [2.5, None])},
        "acc": {"training": Curve([1, 2], [0.5, 0.6])},
    }
    assert list(series.metric_curves(finished)) == ["loss", "acc"]


def test_metric_with_several_values_is_shown_by_its_mean() -> None:
    finished = {0: events.EpochEnded(epoch=0, logs={"f1": np.array([0.2, 0.4])})}
    assert series.metric_curves(finished)["f1"]["training"].y == pytest.approx([0.3])


def test_learning_rate_in_the_logs_is_no_metric() -> None:
    assert list(series.metric_curves({0: ended(0, rate=0.1, loss=1.0, learning_rate=0.1)})) == ["loss"]
    assert list(series.metric_curves({0: ended(0, loss=1.0, lr=0.1)})) == ["loss", "lr"]


def test_learning_rate_leaves_out_epochs_without_one() -> None:
    assert series.learning_rate({0: ended(0), 1: ended(1, rate=0.1)}) == Curve([2], [0.1])


def test_clock_leaves_out_the_time_between_calls() -> None:
    clock = RunClock(SPANS)
    assert clock.total == pytest.approx(25.5)
    assert clock.seconds(1014) == 14
    assert clock.seconds(1100) == pytest.approx(22.5)
    assert clock.seconds(1124.5) == pytest.approx(24.5)
    assert (clock.seconds(0), clock.seconds(9999)) == (0, pytest.approx(25.5))


def test_progress_measures_throughput_without_the_first_step_and_breaks_at_restarts() -> None:
    progress = series.progress(LOG, RunClock(SPANS))
    assert progress.loss == Curve([9, 14, 18, 22.5, 24.5], [2.0, 1.5, None, 1.4, None])
    assert progress.rows_per_s.y == [20, 20, None, 20, None]
    assert progress.data_wait.y == [0.2, 0, None, 0, None]
    assert progress.counts_rows


def test_progress_counts_steps_if_the_batch_size_is_unknown() -> None:
    log = [started(0, batch_size=None), events.EpochStarted(epoch=0, step=0, time=0), batches(0, 4, 2)]
    progress = series.progress(log, RunClock([Span(0, 2, "steps")]))
    assert progress.rows_per_s == Curve([2], [2.0])
    assert not progress.counts_rows


def test_progress_of_a_long_run_has_few_points() -> None:
    log = [started(0), events.EpochStarted(epoch=0, step=0, time=0), *(batches(0, n, n) for n in range(1, 20_000))]
    progress = series.progress(log, RunClock([Span(0, 20_000, "steps")]))
    assert 200 < len(progress.loss.x) <= series.NUM_POINTS
    assert progress.rows_per_s.values == pytest.approx([10.0] * len(progress.rows_per_s.x))


def test_marks_tell_what_happened_and_when() -> None:
    marks = series.marks(LOG, RunClock(SPANS))
    assert [(mark.kind, round(mark.seconds, 3)) for mark in marks] == [
        ("checkpoint", 14),
        ("failure", 16),
        ("restart", 18),
        ("resume", 24.5),
        ("warning", 25.5),
    ]
    assert marks[0].text == "Checkpoint saved in epoch 1 after step 15."
    assert marks[1].text == "Worker of rank 1 on b failed: It was killed."
    assert marks[2].text == "Restarted with 1 worker in epoch 1 after step 15."
    assert marks[3].text == "Resumed by another call of fit, with 2 workers after epoch 1."


def test_step_times_of_workers_are_means_over_all_epochs() -> None:
    def of(rank: int, num_steps: int, seconds: float, wait_s: float) -> events.Event:
        return events.WorkerStepsEnded(rank=rank, num_steps=num_steps, seconds=seconds, wait_s=wait_s)

    log = [of(1, 10, 1.0, 0.5), of(0, 10, 1.0, 0.1), of(0, 30, 7.0, 0.3), of(0, 0, 0.0, 0.0)]
    assert series.worker_times(log) == [WorkerTime(0, 40, 0.2, pytest.approx(0.01)), WorkerTime(1, 10, 0.1, 0.05)]


def test_buckets_add_up_to_the_time_of_the_run() -> None:
    seconds = series.bucket_seconds(SPANS)
    assert set(seconds) == set(goodput.BUCKETS)
    assert sum(seconds.values()) == pytest.approx(25.5)


@given(
    st.lists(st.tuples(st.floats(0.001, 100), st.sampled_from(list(goodput.BUCKETS))), min_size=1), st.integers(1, 50)
)
def test_cells_of_timeline_are_filled_and_keep_the_time_of_each_bucket(
    parts: list[tuple[float, str]], num_cells: int
) -> None:
    spans, time = [], 0.0
    for length, bucket in parts:
        spans.append(Span(time, time + length, bucket))
        time += length
    clock = RunClock(spans)
    shares = series.timeline(spans, clock, num_cells)
    np.testing.assert_allclose(sum(shares.values()), np.ones(num_cells), atol=1e-6)
    for bucket, seconds in series.bucket_seconds(spans).items():
        total = shares[bucket].sum() * clock.total / num_cells if bucket in shares else 0.0
        assert total == pytest.approx(seconds, abs=1e-6 * clock.total)
