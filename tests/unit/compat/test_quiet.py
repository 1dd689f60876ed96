"""Garbage collection while a large package is imported."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


@pytest.mark.parametrize("before", ["gc.enable()", "gc.disable()", "gc.freeze()"])
def test_garbage_collector_is_restored(before: str) -> None:
    script = f"""
    import gc
    from raykeras.compat.quiet import _gc_paused
    collections = lambda: sum(generation["collections"] for generation in gc.get_stats())
    {before}
    was_enabled, num_frozen, num_old = gc.isenabled(), gc.get_freeze_count(), len(gc.get_objects(generation=2))
    done = collections()
    with _gc_paused():
        kept = [[] for _ in range(100_000)]
        assert collections() == done
    assert gc.isenabled() == was_enabled
    assert (gc.get_freeze_count() > 0) == (num_frozen > 0)
    if was_enabled and not num_frozen:
        assert len(gc.get_objects(generation=2)) >= num_old + 100_000  # which is rarely collected
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
