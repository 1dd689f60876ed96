"""Processes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fork_server import ForkServer


@pytest.fixture(scope="session")
def forked() -> Iterator[ForkServer]:
    """Runs functions in processes that start with TensorFlow, both Keras and Ray imported."""
    with ForkServer() as server:
        yield server
