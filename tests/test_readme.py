"""What the README shows runs as it stands there."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    monkeypatch.chdir(tmp_path)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "epoch 3/3" in shown.getvalue()
    assert "checkpoints/epoch-0000" in shown.getvalue()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """A Ray head with token authentication, in a session folder of its own; gives the environment."""
    home = tempfile.mkdtemp(prefix="rk", dir="/tmp")  # short: Ray's sockets lie under it
    ports = {name: _free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    bin_folder = os.path.dirname(sys.executable)
    environment |= {
        "RAY_AUTH_MODE": "token",
        "HOME": home,
        "PATH": f"{bin_folder}:{environment['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}",
        "RAY_ADDRESS": f"127.0.0.1:{ports['port']}",
    }
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    subprocess.run([*ray, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    options = [f"--{name}={port}" for name, port in ports.items()]
    options += [f"--temp-dir={home}/ray", "--num-cpus=4", "--object-store-memory=300000000"]
    head = subprocess.Popen(
        [*ray, "start", "--head", "--block", *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield environment
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # asked to end, it would wait half a minute for its workers
        head.wait(60)
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_a_submitted_job_logs_an_epoch_a_line_and_exits_with_zero(head: dict[str, str], tmp_path: Path) -> None:
    assert "ray job submit --working-dir . -- raykeras fit pipelines/digits.py --workers 2" in README
    command = ["--working-dir", ".", "--", "raykeras", "fit", "pipelines/digits.py", "--workers", "2"]
    command += ["--epochs", "2", "--storage", str(tmp_path / "runs")]
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", *command]
    deadline = time.monotonic() + 120
    while True:  # the head takes a while until it takes jobs
        done = subprocess.run(submit, env=head, cwd=ROOT, capture_output=True, text=True, timeout=400)
        if "Job submission server address" in done.stdout or time.monotonic() > deadline:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert "val_accuracy" in lines[1]
    assert list((tmp_path / "runs").glob("digits-*/checkpoints/epoch-000002/model.keras"))
    without = {name: value for name, value in head.items() if name != "HOME"} | {"HOME": "/nonexistent"}
    refused = subprocess.run(
        [*submit[:-2], "--storage", "x"], env=without, cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert refused.returncode != 0
