"""System tests start and kill processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fork_server import ForkServer


@pytest.fixture(scope="session")
def forked() -> Iterator[ForkServer]:
    """Start a server that runs functions in forked processes, with TensorFlow, Keras, tf_keras and Ray imported."""
    with ForkServer() as server:
        yield server
