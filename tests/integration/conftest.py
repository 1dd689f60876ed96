"""One TensorFlow and one Ray for the whole session."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_ray(ray_cluster: None) -> None:
    """Otherwise the first test that streams would start another one."""


@pytest.fixture(autouse=True)
def frozen_objects(tensorflow: None) -> None:
    """Keeps `clear_session` from collecting garbage among all of TensorFlow's objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_automatic_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests stream their rows unless they ask for the cache."""
    monkeypatch.setenv("RAYKERAS_AUTO_CACHE_BYTES", "0")
