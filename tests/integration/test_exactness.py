"""Any number of workers and replicas gives the history and weights of plain `model.fit`.

These cases of the grid in `benchmarks/exactness.py` differ in kind: Keras 3 and tf_keras, with and without weights, a
last batch that leaves a replica empty or with fewer rows, and a single short batch. Three workers are compared in
`tests/system/test_killed.py`.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from benchmarks.exactness import HISTORY_TOLERANCE, WEIGHT_TOLERANCE, Case, compare


def assert_exact(case: Case, folder: Path) -> None:
    difference = compare(case, folder)
    assert difference.history <= HISTORY_TOLERANCE
    assert difference.weights <= WEIGHT_TOLERANCE


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, "keras", 257, True),
        Case(1, 1, "tf_keras", 27, False),
        Case(1, 2, "keras", 257, True),
        Case(1, 2, "keras", 27, False),
        Case(1, 2, "tf_keras", 257, True),
        Case(2, 2, "keras", 257, True),
    ],
    ids=str,
)
def test_training_matches_keras(case: Case, tmp_path: Path) -> None:
    assert_exact(case, tmp_path)


@pytest.mark.usefixtures("two_workers")
@pytest.mark.parametrize("case", [Case(2, 1, "keras", 257, True), Case(2, 1, "tf_keras", 27, True)], ids=str)
def test_training_on_two_workers_matches_keras(case: Case, tmp_path: Path) -> None:
    assert_exact(case, tmp_path)


def test_untested_keras_is_refused_on_several_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    from raykeras import ModelError
    from raykeras.compat.keras_api import KerasAPI
    from raykeras.data.batch_spec import BatchSpec
    from raykeras.distribute import exact

    monkeypatch.setattr(exact, "TESTED_KERAS", ("2.99",))
    batch_spec = BatchSpec((), (), {}, (), {})
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with (
        pytest.raises(ModelError, match=r"tested with: 2\.99; got 3\."),
        exact.exact(None, KerasAPI("keras"), batch_spec, strategy, []),
    ):
        pass


def test_replica_threads_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorflow.python.distribute import mirrored_run

    from raykeras.compat.tensorflow import replicas_joined

    original = mirrored_run.coordinator.Coordinator
    waits: list[float] = []
    monkeypatch.setattr(original, "wait_for_stop", lambda self, timeout: waits.append(timeout))
    with replicas_joined():
        leaving = threading.Thread(target=time.sleep, args=(0.1,))
        leaving.start()
        mirrored_run.coordinator.Coordinator().join([leaving])
    assert not waits and not leaving.is_alive()
    assert mirrored_run.coordinator.Coordinator is original
