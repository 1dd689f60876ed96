"""Logical CPUs that are reserved by other work in Ray."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import ray

_SETTLED_S, _TIMEOUT_S = 0.5, 120.0


def free_cpus() -> float:
    """Return the number of free CPUs, once Ray's count is stable."""
    before, now = None, ray.available_resources().get("CPU", 0.0)
    while now != before:
        time.sleep(_SETTLED_S)
        before, now = now, ray.available_resources().get("CPU", 0.0)
    return now


@contextlib.contextmanager
def all_held_but(cpus: float) -> Iterator[None]:
    """Reserve all free CPUs except `cpus` with an actor while the block runs."""

    @ray.remote
    class Holder:
        def is_ready(self) -> bool:
            return True

    deadline = time.monotonic() + _TIMEOUT_S
    while True:  # tasks of earlier tests may still be ending
        assert time.monotonic() < deadline, ray.available_resources()
        if (free := free_cpus()) <= cpus:
            continue
        holder = Holder.options(num_cpus=round(free - cpus, 4)).remote()
        try:
            assert ray.get(holder.is_ready.remote())
            if abs(free_cpus() - cpus) < 1e-3:
                yield
                return
        finally:
            ray.kill(holder)
