"""The size of Ray's object store."""

from __future__ import annotations

import gc
import time

import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

_FREED_S = 1.1  # Ray frees objects once a second


def store_nbytes() -> int:
    """Return the size of all objects in bytes."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.object_store_bytes_used)


def free_garbage() -> None:
    """Wait until the store has freed the objects of earlier tests."""
    gc.collect()
    previous = -1
    while (current := store_nbytes()) != previous:
        previous = current
        time.sleep(_FREED_S)
