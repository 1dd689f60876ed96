"""One Ray and one TensorFlow, of two logical CPU devices, for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

from raykeras import held, inference, launch
from raykeras.cluster import connect
from raykeras.noise import import_tensorflow, quiet
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


@pytest.fixture(scope="session", autouse=True)
def footers_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a run keeps of Parquet footers is not what another finds."""
    os.environ["RAYKERAS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are about streams, unless they ask for rows to be held."""
    monkeypatch.setattr(held, "AUTO_NBYTES", 0)


@pytest.fixture(scope="module")  # they hold a part of a CPU, which others' data tasks may need
def kept_workers(tmp_path_factory: pytest.TempPathFactory, ray_ends: None) -> Iterator[KeptWorkers]:
    """Two worker processes for all examples of a module; see `tests.kept`."""
    connect(TWO, in_process=False)
    workers = KeptWorkers(tmp_path_factory.mktemp("kept"))
    yield workers
    workers.close()


@pytest.fixture
def two_workers(kept_workers: KeptWorkers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets what two workers do in this test be done by those that are kept."""
    for module in (launch, inference):
        monkeypatch.setattr(module, "run_on_workers", kept_workers.run_on_workers)


@pytest.fixture(scope="session", autouse=True)
def ray_ends() -> Iterator[None]:
    """The Ray that the first test which needs one starts ends with the session."""
    yield
    import ray

    ray.shutdown()
