"""One Ray and one TensorFlow, of two logical CPU devices, for the whole session."""

from __future__ import annotations

import dataclasses
import gc
import os
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

from raykeras import cluster, held
from raykeras.noise import import_tensorflow, quiet
from raykeras.patching import replaced
from tests.kept import TWO, KeptWorkers

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "600"


@pytest.fixture(scope="session", autouse=True)
def two_logical_cpus() -> None:
    """TensorFlow makes logical devices only when it starts."""
    quiet()
    import_tensorflow()
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )


@pytest.fixture(autouse=True)
def what_stays_is_frozen(two_logical_cpus: None) -> None:
    """Or `clear_session` would look through all of TensorFlow, each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def footers_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a run keeps of Parquet footers is not what another finds."""
    os.environ["RAYKERAS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are about streams, unless they ask for rows to be held."""
    monkeypatch.setattr(held, "AUTO_NBYTES", 0)


@pytest.fixture(scope="session", autouse=True)
def ray_of_its_own() -> Iterator[None]:
    """The Ray that the first test which needs one starts ends with the session.

    It has a CPU more than it would have: two workers leave one for data tasks beside the part that kept workers take.
    Its folder is its own, or it would find the address that another Ray of this machine has left in the common one.
    """
    start = cluster._start
    with (
        # short: Ray's sockets lie under it
        tempfile.TemporaryDirectory(prefix="rk", dir="/tmp", ignore_cleanup_errors=True) as folder,
        replaced(cluster, "_start", lambda scale: start(dataclasses.replace(scale, workers=scale.workers + 1))),
    ):
        os.environ["RAY_TMPDIR"] = folder
        yield
        import ray

        ray.shutdown()


@pytest.fixture(scope="session")
def kept_workers(tmp_path_factory: pytest.TempPathFactory, ray_of_its_own: None) -> Iterator[KeptWorkers]:
    """Two worker processes for all tests that ask for them; see `tests.kept`."""
    cluster.connect(TWO, in_process=False)
    workers = KeptWorkers(tmp_path_factory.mktemp("kept"))
    yield workers
    workers.close()


@pytest.fixture
def two_workers(kept_workers: KeptWorkers) -> Iterator[None]:
    """Lets what two workers do in this test be done by those that are kept."""
    with kept_workers.used():
        yield
