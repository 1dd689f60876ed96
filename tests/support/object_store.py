"""What Ray's object store holds."""

from __future__ import annotations

import gc
import time

import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

_FREED_S = 1.1  # Ray frees objects once a second


def store_nbytes() -> int:
    """Return the bytes of all objects."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.object_store_bytes_used)


def free_garbage() -> None:
    """Let the store free the objects of earlier tests."""
    gc.collect()
    before = -1
    while (now := store_nbytes()) != before:
        before = now
        time.sleep(_FREED_S)
