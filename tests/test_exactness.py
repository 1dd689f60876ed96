"""Any number of workers and replicas gives the numbers of plain `model.fit`.

These are the cases of the grid in `benchmarks/exactness.py` that differ in kind; `make bench` runs all.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest

from benchmarks.exactness import HISTORY_TOLERANCE, WEIGHT_TOLERANCE, Case, compare
from tests.kept import TWO, KeptWorkers

CASES = [
    Case(1, 1, "keras", 257, True),
    Case(1, 1, "tf_keras", 27, False),
    Case(1, 2, "keras", 257, True),
    Case(1, 2, "keras", 27, False),
    Case(1, 2, "tf_keras", 257, True),
    Case(2, 1, "keras", 257, True),
    Case(2, 1, "tf_keras", 27, True),
    Case(2, 2, "keras", 257, True),
    Case(3, 1, "keras", 98, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_that_of_plain_keras(case: Case, kept_workers: KeptWorkers, tmp_path: Path) -> None:
    with kept_workers.used() if case.scale == TWO else contextlib.nullcontext():
        difference = compare(case, tmp_path)
    assert difference.history <= HISTORY_TOLERANCE
    assert difference.weights <= WEIGHT_TOLERANCE


def test_an_untested_keras_is_refused_on_several_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    from raykeras import ModelError, exactness
    from raykeras.columns import Layout
    from raykeras.keras_api import KerasAPI

    monkeypatch.setattr(exactness, "TESTED_KERAS", ("2.99",))
    layout = Layout((), (), {}, (), {})
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with (
        pytest.raises(ModelError, match=r"tested with: 2\.99; got 3\."),
        exactness.exact(None, KerasAPI("keras"), layout, strategy, []),
    ):
        pass


def test_replicas_that_are_still_leaving_are_waited_for_until_they_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorflow.python.distribute import mirrored_run

    from raykeras.strategy import replicas_joined

    theirs = mirrored_run.coordinator.Coordinator
    looks: list[float] = []
    monkeypatch.setattr(theirs, "wait_for_stop", lambda self, timeout: looks.append(timeout))
    with replicas_joined():
        leaving = threading.Thread(target=time.sleep, args=(0.1,))
        leaving.start()
        mirrored_run.coordinator.Coordinator().join([leaving])
    assert not looks and not leaving.is_alive()
    assert mirrored_run.coordinator.Coordinator is theirs
