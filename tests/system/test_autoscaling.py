"""A run on a cluster whose autoscaler adds the workers' nodes when they are needed."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.three_hosts import undisturbed


@pytest.mark.usefixtures("tensorflow")
def test_nodes_are_added_for_a_run_and_removed_after_it(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-m", "tests.support.autoscaled", str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    *events, after, last = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    nodes = {event["phase"] or event["event"]: event["nodes"] for event in events}
    assert nodes["workers"] == 1  # the head
    assert nodes["build"] == nodes["RunEnded"] == 3
    assert after["nodes"] == 1
    expected = undisturbed(str(tmp_path))
    for name, values in expected.history.items():
        np.testing.assert_allclose(last["history"][name], values, rtol=1e-5, err_msg=name)
