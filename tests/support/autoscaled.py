"""A run on a cluster that starts without workers' nodes: Ray's autoscaler adds them, and removes them afterwards.

    python -m tests.support.autoscaled STORAGE

trains the run "run". It prints the number of nodes at each event and at last, as JSON lines, and the history as the
last line. The nodes are processes on this machine, from the provider of Ray's own tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import raykeras as rk
from tests.support.three_hosts import fit, write_data

_IDLE_S = 3
_DEADLINE_S = 60


def _configuration(address: str) -> dict[str, Any]:
    """Return what `ray up` would read from a YAML file: a head without CPUs, and up to two nodes of a CPU each."""
    types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "trainer": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    unused = ("auth", "file_mounts", "head_node", "worker_nodes", "docker")
    return {
        **{name: {} for name in unused},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "worker_start_ray_commands": [],
        "head_start_ray_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "file_mounts_sync_continuously": False,
        "cluster_name": "autoscaled",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": _IDLE_S / 60,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
        },
        "available_node_types": types,
        "head_node_type": "ray.head.default",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """Start the cluster, yield its address, and end its processes."""
    import ray

    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        port = _free_port()
        address = f"{ray.util.get_node_ip_address()}:{port}"
        config = Path(folder, "autoscaler.json")
        config.write_text(json.dumps(_configuration(address)))
        environment = {**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
        command += ["--num-cpus=0", "--include-dashboard=false"]
        command += ["--disable-usage-stats", f"--autoscaling-config={config}"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        head = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)
        try:
            yield address
        finally:
            os.killpg(head.pid, signal.SIGKILL)  # SIGTERM would wait half a minute for the workers
            head.wait()


class CountsNodes(rk.DriverCallback):
    """Prints each event and the number of nodes."""

    def on_event(self, event: rk.Event) -> None:
        if not isinstance(event, rk.BatchEnded):
            print(
                json.dumps({"event": event.kind, "phase": getattr(event, "phase", ""), "nodes": _nodes()}), flush=True
            )


def _nodes() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def _connect(address: str) -> None:
    import ray

    deadline = time.monotonic() + _DEADLINE_S
    while True:
        try:
            ray.init(address=address, log_to_driver=False)
            return
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def main(storage: str) -> None:
    import ray

    write_data(storage)
    with cluster() as address:
        _connect(address)
        try:
            scale = rk.Scale(workers=2, idle_timeout_s=0)
            result = fit(storage, "run", callbacks=[CountsNodes()], scale=scale)
            deadline = time.monotonic() + _DEADLINE_S
            while _nodes() > 1 and time.monotonic() < deadline:
                time.sleep(1)
            print(json.dumps({"event": "", "phase": "", "nodes": _nodes()}))
            print(json.dumps({"history": result.history}), flush=True)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
