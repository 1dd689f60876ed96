"""Any number of workers and replicas gives the history and weights of plain `model.fit`.

These are representative cases of the grid in `benchmarks/exactness.py`: Keras 3 and tf_keras, with and without weights,
a last batch that leaves a replica empty or with fewer rows, and a single short batch. Two workers of two replicas each,
and the three workers of `tests/system/test_killed.py`, are compared with `--exhaustive`.
"""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest

from benchmarks.exactness import HISTORY_TOLERANCE, WEIGHT_TOLERANCE, Case, compare
from raykeras import ModelError
from raykeras.compat import versions
from raykeras.compat.keras_api import KerasAPI
from raykeras.core.config import Scale


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
        pytest.param(Case(2, 2, "keras", 257, True), marks=pytest.mark.exhaustive),  # starts two processes
    ],
    ids=str,
)
def test_training_matches_keras(case: Case, tmp_path: Path) -> None:
    assert_exact(case, tmp_path)


@pytest.mark.usefixtures("two_workers")
@pytest.mark.parametrize("case", [Case(2, 1, "keras", 257, True), Case(2, 1, "tf_keras", 27, True)], ids=str)
def test_training_on_two_workers_matches_keras(case: Case, tmp_path: Path) -> None:
    assert_exact(case, tmp_path)


@pytest.mark.parametrize("package", ["keras", "tf_keras"])
def test_untested_keras_must_pass_self_check(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from raykeras.distribute import exact_keras, exact_tf_keras, self_check, weighting
    from raykeras.distribute.strategy import make_strategy

    strategy, api = make_strategy(Scale(replicas_per_worker=2)), KerasAPI(package)
    monkeypatch.setitem(versions.TESTED, package, ">=1.98,<1.99")  # type: ignore[arg-type]
    monkeypatch.setattr(self_check, "_verdicts", {})
    self_check.check_version(api, strategy)
    assert list(self_check._verdicts.values()) == [""]
    self_check._verdicts.clear()
    monkeypatch.setattr(weighting, "unscaled", lambda value: value)
    for module in (exact_keras, exact_tf_keras):
        monkeypatch.setattr(module, "scaled", lambda value: weighting.scaled(value) * 1.001)
    for _ in range(2):  # the second time with the cached verdict
        with pytest.raises(ModelError, match=rf"got {package} {re.escape(api.version)}.* differ: .*weight 0"):
            self_check.check_version(api, strategy)


def test_replica_threads_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf
    from tensorflow.python.distribute import mirrored_run

    from raykeras.compat.tensorflow import prompt_replica_join

    original = tf.train.Coordinator.join
    waits: list[float] = []
    monkeypatch.setattr(tf.train.Coordinator, "wait_for_stop", lambda self, timeout: waits.append(timeout))
    with prompt_replica_join():
        leaving = threading.Thread(target=time.sleep, args=(0.1,))
        leaving.start()
        mirrored_run.coordinator.Coordinator().join([leaving])
    assert not waits and not leaving.is_alive()
    assert tf.train.Coordinator.join is original
