"""Integration tests share one TensorFlow and one Ray."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_ray(ray_cluster: None) -> None:
    """Start Ray before the first test that streams would start another one."""


@pytest.fixture(autouse=True)
def frozen_objects(tensorflow: None) -> None:
    """Exclude existing objects from the garbage collection of `clear_session`, which is slow with TensorFlow loaded."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_automatic_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stream rows unless a test requests the cache."""
    monkeypatch.setenv("RAYKERAS_AUTO_CACHE_BYTES", "0")
