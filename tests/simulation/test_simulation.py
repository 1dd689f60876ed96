"""Seeded simulations find nothing in the code, and find each of three mistakes that are made on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from raykeras.checkpoint import store
from raykeras.core import events
from raykeras.driver import event_log
from raykeras.worker.job import TrainJob
from tests.simulation.ray_api import installed
from tests.simulation.simulation import Simulation, failure_of

NUM_SEEDS = 2000


def test_runs_survive_faults() -> None:
    """`make simulate` runs more seeds, and `make test` does so first."""
    with installed():
        failures = {seed: failure for seed in range(100) if (failure := failure_of(seed))}
    assert not failures


def test_a_seed_is_replayed_by_its_number() -> None:
    def trace(hash_seed: str) -> str:
        command = [sys.executable, "-m", "tests.simulation", "--first", "56", "--seeds", "1", "--trace"]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.rpartition(
            "\n1 "
        )[0]

    assert trace("1") == trace("2") != ""


def _marked_before_last_file(monkeypatch: pytest.MonkeyPatch) -> None:
    names = sorted

    def state_file_first(files: Any, key: Callable[[str], bool] | None = None) -> list[str]:
        return names(files) if key is None else names(files, key=lambda file: not key(file))

    monkeypatch.setattr(store, "sorted", state_file_first, raising=False)


def _event_sent_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with_missing = event_log.EventDispatcher._with_missing

    def repeated(self: event_log.EventDispatcher, event: events.Event) -> list[events.Event]:
        result = with_missing(self, event)
        return [*result, event] if isinstance(event, events.RunRestarted) else result

    monkeypatch.setattr(event_log.EventDispatcher, "_with_missing", repeated)


def _row_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    first_step = TrainJob.first_step.fget
    assert first_step is not None

    def one_later(self: TrainJob) -> int:
        return first_step(self) + (self.start[1] > 0)

    monkeypatch.setattr(TrainJob, "first_step", property(one_later))


@pytest.mark.parametrize("mistake", [_marked_before_last_file, _event_sent_twice, _row_skipped])
def test_finds_a_mistake(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with installed():
        mistake(monkeypatch)
        found = next((seed for seed in range(NUM_SEEDS) if failure_of(seed)), None)
    assert found is not None
    print(f"found by seed {found}")


def test_checks_depend_on_the_seed() -> None:
    """Different seeds are different runs."""
    with installed():
        switches = set()
        for seed in range(5):
            simulation = Simulation(seed)
            simulation.run()
            switches.add(simulation.scheduler.num_switches)
    assert len(switches) == 5
