"""Logical CPUs that others hold."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import ray

_SETTLED_S = 0.5


def free_cpus() -> float:
    """Once Ray has counted again what the last tests left."""
    seen, now = None, ray.available_resources().get("CPU", 0.0)
    while now != seen:
        time.sleep(_SETTLED_S)
        seen, now = now, ray.available_resources().get("CPU", 0.0)
    return now


@contextlib.contextmanager
def all_held_but(cpus: float) -> Iterator[None]:
    """While an actor holds all of the Ray's free CPUs but so many."""

    @ray.remote
    class Holder:
        def is_there(self) -> bool:
            return True

    while (free := free_cpus()) <= cpus:  # what the first connection started still runs
        pass
    holder = Holder.options(num_cpus=round(free - cpus, 4)).remote()
    assert ray.get(holder.is_there.remote())
    assert abs(free_cpus() - cpus) < 1e-3
    try:
        yield
    finally:
        ray.kill(holder)
