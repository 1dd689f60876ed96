"""The README's commands run as written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EPOCHS = 60
"""Enough for `ray job stop` to find the job in the middle."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """Start a Ray head with token authentication and its own home folder; return the environment of its clients."""
    home = tempfile.mkdtemp()
    ports = {name: _free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    bin_folder = os.path.dirname(sys.executable)
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
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
        _wait_for_jobs_api(environment["RAY_API_SERVER_ADDRESS"])
        yield environment
    finally:
        os.killpg(head.pid, signal.SIGKILL)  # SIGTERM would wait half a minute for the workers
        head.wait(60)
        shutil.rmtree(home, ignore_errors=True)


def _wait_for_jobs_api(address: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=10).close()
        except urllib.error.HTTPError as error:
            if error.code == 401:  # it is up and requires the token
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, "the head accepts no jobs"
        time.sleep(0.5)


def ray_job(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `ray job`; retry until the node's agent, which starts last, is available."""
    command, deadline = [sys.executable, "-m", "ray.scripts.scripts", "job", *arguments], time.monotonic() + 120
    while True:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
        if "No available agent" not in done.stderr or time.monotonic() > deadline:
            return done


def test_submitted_job_trains(head: dict[str, str], tmp_path: Path) -> None:
    assert "ray job submit --working-dir . -- raykeras fit pipelines/digits.py --workers 2" in README
    submit = ["submit", "--working-dir", ".", "--"]
    command = ["raykeras", "fit", "pipelines/digits.py", "--workers", "2", "--epochs", "2"]
    options = ["--storage", str(tmp_path / "runs")]
    done = ray_job(*submit, *command, *options, environment=head)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("Epoch ")]
    assert [line.split(":")[0] for line in lines] == ["Epoch 1/2", "Epoch 2/2"]
    assert "val_accuracy" in lines[1]
    assert list((tmp_path / "runs").glob("digits-*/checkpoints/epoch-000002/model.keras"))
    without_token = {**head, "HOME": "/nonexistent"}
    refused = ray_job(*submit, *command, environment=without_token)
    assert refused.returncode != 0


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_stopped_job_resumes_when_it_is_submitted_again(head: dict[str, str], tmp_path: Path, workers: int) -> None:
    run = tmp_path / "run"
    command = ["raykeras", "fit", "pipelines/digits.py", "--epochs", str(EPOCHS), "--checkpoint-every", "none"]
    command += ["--workers", str(workers), "--storage", str(run.parent), "--name"]
    name = f"stopped-{workers}"
    submit = ["submit", "--working-dir", "."]
    done = ray_job(*submit, "--no-wait", "--submission-id", name, "--", *command, run.name, environment=head)
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 120
    while not (run / "events.jsonl").exists() or "EpochEnded" not in (run / "events.jsonl").read_text():
        assert time.monotonic() < deadline, ray_job("logs", name, environment=head).stdout
        time.sleep(0.5)
    assert ray_job("stop", name, environment=head).returncode == 0
    last = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["status"]) == ("RunEnded", "interrupted")
    (checkpoint,) = run.glob("checkpoints/epoch-*/model.keras")
    assert int(checkpoint.parent.name.split("-")[1]) < EPOCHS
    again = ray_job(*submit, "--", *command, run.name, environment=head)
    assert again.returncode == 0, again.stdout + again.stderr
    undisturbed = ray_job(*submit, "--", *command, "undisturbed", environment=head)
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    history = (run / "history.csv").read_text()
    assert len(history.splitlines()) == 1 + EPOCHS
    assert history == (tmp_path / "undisturbed" / "history.csv").read_text()
