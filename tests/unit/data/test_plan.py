"""The row order covers each row once, does not depend on the number of ranks, and is seekable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raykeras.data.plan import PassPlan, default_num_shards, replica_cuts, window_rows_for

ORDERS = ["shuffled", "sharded", "source"]


@st.composite
def plans(draw: Any, order: str | None = None) -> PassPlan:
    unit_rows = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda rows: sum(rows) > 0))
    return PassPlan(
        np.array(unit_rows),
        global_batch_size=draw(st.integers(1, 50)),
        num_shards=draw(st.sampled_from([8, 16])),
        window_rows=draw(st.sampled_from([1, 7, 32, 1 << 20])),
        order=order or draw(st.sampled_from(ORDERS)),
        seed=draw(st.integers(0, 5)),
        epoch=draw(st.integers(0, 5)),
    )


@given(plans())
def test_every_row_occurs_once_per_pass(plan: PassPlan) -> None:
    assert sorted(plan.rank_rows(0, 1).tolist()) == list(range(plan.num_rows))


@given(plans(), st.integers(2, 8))
def test_batches_are_independent_of_num_ranks(plan: PassPlan, num_ranks: int) -> None:
    rows = [plan.rank_rows(rank, num_ranks) for rank in range(num_ranks)]
    cuts = [plan.batch_cuts(0, plan.num_steps, rank, num_ranks) for rank in range(num_ranks)]
    for step in range(plan.num_steps):
        ranges = [plan.batch_range(step, rank, num_ranks) for rank in range(num_ranks)]
        assert ranges == [(cut[step], cut[step + 1]) for cut in cuts]
        slices = [rows[rank][start:stop] for rank, (start, stop) in enumerate(ranges)]
        joined = np.concatenate(slices)
        assert len(joined) == plan.batch_num_rows(step)
        assert sorted(joined) == sorted(plan.batch_rows(step))


@given(plans(), st.integers(1, 8), st.data())
def test_seeking_equals_iterating(plan: PassPlan, num_ranks: int, data: Any) -> None:
    step = data.draw(st.integers(0, plan.num_steps - 1))
    for rank in range(num_ranks):
        start = plan.batch_range(step, rank, num_ranks)[0]
        np.testing.assert_array_equal(plan.rank_rows(rank, num_ranks, step), plan.rank_rows(rank, num_ranks)[start:])
        every = list(plan.windows(rank, num_ranks))
        from_step = list(plan.windows(rank, num_ranks, step))
        assert [w for w in every if w in from_step] == from_step


@given(plans(order="source"))
def test_source_order_does_not_shuffle(plan: PassPlan) -> None:
    np.testing.assert_array_equal(plan.rank_rows(0, 1), np.arange(plan.num_rows))


@given(plans(order="sharded"))
def test_short_last_validation_batch_has_last_rows(plan: PassPlan) -> None:
    short = plan.num_rows % plan.global_batch_size
    if short:
        expected = np.arange(plan.num_rows - short, plan.num_rows)
        assert sorted(plan.batch_rows(plan.num_steps - 1)) == expected.tolist()


@given(plans(order="shuffled"), st.integers(1, 8))
def test_units_are_read_once_except_at_shard_ends(plan: PassPlan, num_ranks: int) -> None:
    pieces = [p for rank in range(num_ranks) for w in plan.windows(rank, num_ranks) for p in w.pieces]
    units = {unit for unit, _, _ in pieces}
    assert len(pieces) <= len(units) + plan.num_shards - 1


@given(plans(), st.integers(1, 8))
def test_windows_are_in_order_of_use(plan: PassPlan, num_ranks: int) -> None:
    for rank in range(num_ranks):
        starts = [window.start for window in plan.windows(rank, num_ranks)]
        assert starts == sorted(starts)


def test_order_differs_by_epoch_and_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return PassPlan(np.full(50, 20), global_batch_size=32, seed=seed, epoch=epoch).rank_rows(0, 1).tolist()

    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(1, 2) == order(1, 2)


def test_batches_draw_from_whole_source() -> None:
    plan = PassPlan(np.full(100, 100), global_batch_size=64, window_rows=1000)
    spread = [np.ptp(plan.batch_rows(step)) for step in range(plan.num_steps - 1)]
    assert np.mean(spread) > 0.7 * plan.num_rows


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("shuffled", [[10, 11, 1, 4, 15, 18, 19], [6, 8, 13, 0, 3, 16, 17], [5, 7, 9, 12, 14, 2]]),
        ("sharded", [[0, 2, 4, 6, 8, 10, 12], [13, 1, 3, 5, 7, 9, 11], [14, 15, 16, 17, 18, 19]]),
        ("source", [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13], [14, 15, 16, 17, 18, 19]]),
    ],
)
def test_order_is_pinned(order: str, expected: list[list[int]]) -> None:
    """A changed order would prevent earlier runs from resuming."""
    plan = PassPlan(np.array([5, 3, 7, 5]), global_batch_size=7, window_rows=4, order=order, seed=3, epoch=1)  # type: ignore[arg-type]
    assert [plan.batch_rows(step).tolist() for step in range(plan.num_steps)] == expected


@given(st.integers(0, 100), st.integers(1, 9))
def test_replicas_share_rows_evenly(num_rows: int, local_replicas: int) -> None:
    sizes = np.diff(replica_cuts(num_rows, local_replicas))
    assert sizes.sum() == num_rows
    assert sizes.max() - sizes.min() <= 1


def test_default_num_shards_and_window_rows() -> None:
    assert [default_num_shards(n) for n in (1, 8, 9, 64, 65)] == [8, 8, 16, 64, 128]
    assert window_rows_for(784) == 8192
    assert window_rows_for(1 << 30) == 256


@settings(max_examples=1)
@given(st.just(1_000_000))
def test_seeking_works_in_a_million_units(num_units: int) -> None:
    plan = PassPlan(np.full(num_units, 1000), global_batch_size=256, window_rows=100_000)
    window = next(plan.windows(0, 1, plan.num_steps - 1))
    assert window.num_rows <= 101_000
