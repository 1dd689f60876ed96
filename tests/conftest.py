"""Shared fixtures: a temporary folder, TensorFlow, Ray, an S3 server and kept workers, each started on first use.

The folder is removed at the end, and processes that outlive the session fail it. Pass `--basetemp=FOLDER` to keep the
files that tests wrote.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest

from raykeras.core.config import Scale
from raykeras.driver.worker_pool import prepare, run_on_workers
from tests.support import leftovers
from tests.support.graphs import skip_graph_optimization, skip_graph_optimization_on_worker
from tests.support.models import TWO
from tests.support.s3 import S3

NUM_CPUS = 4  # three workers, and one CPU for data tasks
_LEFTOVERS = pytest.StashKey[list[str]]()

hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exhaustive", action="store_true", help="every combination of packages, scales and forms of data"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "exhaustive: runs only with --exhaustive")
    config.addinivalue_line("markers", "fewer_scales: trains at one scale unless --exhaustive is given")
    config.addinivalue_line("markers", "tf_keras_on_replicas: tf_keras on two replicas unless --exhaustive is given")
    config.option.loadscopereorder = False  # xdist would run the longest tests last, with one process idle
    if hasattr(config, "workerinput"):  # xdist's workers inherit the folder
        return
    folder = tempfile.mkdtemp(prefix="rk", dir="/tmp")  # short, because the length of Ray's socket paths is limited
    os.environ |= {leftovers.SESSION: folder, "TMPDIR": folder, "RAYKERAS_CACHE": f"{folder}/cache"}
    tempfile.tempdir = None


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run tests that share processes, or a module, in one of xdist's workers; start with the longest groups."""
    if not config.getoption("--exhaustive"):
        deselected = [item for item in items if item.get_closest_marker("exhaustive")]
        items[:] = [item for item in items if item not in deselected]
        config.hook.pytest_deselected(items=deselected)
    groups = {}
    for item in items:
        shared = {"forked", "kept_workers", "two_workers"} & set(getattr(item, "fixturenames", ()))
        if _on_replicas(item):
            shared.discard("two_workers")
        groups[item] = "kept_workers" if shared == {"two_workers"} else min(shared, default=item.path.stem)
        item.add_marker(pytest.mark.xdist_group(groups[item]))
    sizes = Counter(groups.values())
    shared = ("kept_workers", "forked")
    items.sort(key=lambda item: (groups[item] not in shared, item.path.parent.name != "system", -sizes[groups[item]]))


def _on_replicas(item: pytest.Item) -> bool:
    is_tf_keras = hasattr(item, "callspec") and item.callspec.params.get("package") == "tf_keras"
    marked = item.get_closest_marker("tf_keras_on_replicas") and not item.config.getoption("--exhaustive")
    return bool(is_tf_keras and marked)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    folder = os.environ.pop(leftovers.SESSION)
    session.config.stash[_LEFTOVERS] = leftovers.end_processes(folder)
    shutil.rmtree(folder, ignore_errors=True)
    if session.config.stash[_LEFTOVERS]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_LEFTOVERS, []):
        terminalreporter.write_line(f"ERROR: left behind by the tests: {line}", red=True)


@pytest.fixture(scope="session")
def tensorflow() -> None:
    """Start TensorFlow with two logical CPU devices, which must be created before TensorFlow starts."""
    from raykeras.compat.quiet import import_tensorflow, quiet

    quiet()
    import_tensorflow()
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )
    skip_graph_optimization()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """Start an S3 server that serves `s3://` URLs in this process and in its child processes."""
    server = S3()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        yield server
    server.close()


@pytest.fixture
def bucket(s3_server: S3, request: pytest.FixtureRequest) -> str:
    """Return the URL of a new bucket."""
    import fsspec

    name = f"test-{zlib.crc32(request.node.nodeid.encode()):08x}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def ray_cluster(tensorflow: None, s3_server: S3) -> Iterator[None]:
    """Start Ray in a new folder, so that it does not find the address of another Ray on this machine."""
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as environment,
    ):
        environment.setenv("RAY_TMPDIR", folder)
        environment.setenv(
            "RAY_num_workers_soft_limit", "16"
        )  # above the limit, Ray stops idle workers and starts them again
        import ray

        ray.init(num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def kept_workers(ray_cluster: None) -> None:
    """Let a test or a fixture train on two workers, which stay up: all that do run in one process."""
    _skip_graph_optimization_on_workers()


@pytest.fixture
def several(request: pytest.FixtureRequest) -> Scale:
    """Return a scale of two workers, or of two local replicas for tf_keras in tests with `tf_keras_on_replicas`."""
    return Scale(replicas_per_worker=2) if _on_replicas(request.node) else TWO


@pytest.fixture
def two_workers(request: pytest.FixtureRequest, several: Scale) -> None:
    """Let a test train on two workers, which may be new ones since the last test."""
    if several == TWO:
        request.getfixturevalue("kept_workers")
        _skip_graph_optimization_on_workers()


def _skip_graph_optimization_on_workers() -> None:
    if not prepare(TWO, cpus_per_worker=1.0):  # otherwise those of the last test are up
        run_on_workers(skip_graph_optimization_on_worker, {}, scale=TWO, cpus_per_worker=1.0)
