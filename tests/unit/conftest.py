"""Unit tests need neither Ray nor TensorFlow."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

HEAVY = {"ray", "tensorflow", "keras", "tf_keras"}


@pytest.fixture(scope="session", autouse=True)
def no_heavy_imports() -> Iterator[None]:
    """Fail the session if a unit test imports a heavy package."""
    before = HEAVY & set(sys.modules)  # imported by other tests in this process
    yield
    assert not (HEAVY & set(sys.modules)) - before
