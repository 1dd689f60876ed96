"""A Ray that fails to start raises one error."""

from __future__ import annotations

import os
from pathlib import Path

import raykeras as rk
from tests.support.fork_server import ForkServer


def connect_with_folder(folder: str) -> None:
    """Start Ray in a folder, and print the error."""
    from raykeras.driver.cluster import connect

    os.environ["RAY_TMPDIR"] = folder
    try:
        connect(rk.Scale(workers=2), in_process=False)
    except rk.ResourceError as error:
        print(f"ERROR {error}")


def test_failed_ray_start_raises_one_error(forked: ForkServer, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)  # the path of a socket is limited to 107 bytes
    folder.mkdir()
    ended = forked.run(connect_with_folder, str(folder))
    assert ended.exit_code == 0, ended.output
    (line,) = [line for line in ended.output.splitlines() if line.startswith("ERROR")]
    assert "Ray must start, or be reachable; it failed twice: OSError: " in line
    assert f"Its logs are in '{folder}/ray/session_latest/logs'" in line and line.endswith("`ray start --head`.")
