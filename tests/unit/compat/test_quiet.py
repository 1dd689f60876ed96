"""Garbage collection and output while a large package is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

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


@pytest.mark.parametrize("raises", [False, True])
def test_output_of_import_by_user_is_shown_only_if_it_fails(raises: bool, tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text(f"import os\nos.write(2, b'of the import')\n{'1 / 0' * raises}\nname = 1")
    script = """
    import os
    from raykeras.compat.quiet import quiet_user_import
    quiet_user_import()
    quiet_user_import()
    import json
    import tensorflow
    assert tensorflow.name == 1
    os.write(2, b"later")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if raises:
        assert "of the import" in done.stderr and "ZeroDivisionError" in done.stderr
    else:
        assert done.stderr == "later"
