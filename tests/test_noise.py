"""Importing TensorFlow leaves the process as it was, but for TensorFlow."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


@pytest.mark.parametrize("before", ["gc.enable()", "gc.disable()", "gc.freeze()"])
def test_importing_tensorflow_leaves_the_collector_as_it_was(before: str) -> None:
    script = f"""
    import gc
    from raykeras.noise import import_tensorflow
    collections = lambda: sum(generation["collections"] for generation in gc.get_stats())
    {before}
    was_enabled, frozen, done = gc.isenabled(), gc.get_freeze_count(), collections()
    import_tensorflow()
    assert collections() - done < 10  # without this care, 900
    assert gc.isenabled() == was_enabled
    assert (gc.get_freeze_count() > 0) == (frozen > 0)
    if was_enabled and not frozen:
        assert len(gc.get_objects(generation=2)) > 100_000  # no collection goes through them soon
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
