"""Paths that exist on the driver only: a node whose filesystem is another one, in a mount namespace of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raykeras as rk
from tests.support.fork_server import ForkServer
from tests.support.models import dense

pytestmark = [
    pytest.mark.exhaustive,  # next to other tests, `ray start` takes longer than the 30 s that it waits for its node
    pytest.mark.skipif(os.getuid() != 0 or shutil.which("unshare") is None, reason="a mount namespace needs root"),
]


def main(folder: str) -> None:
    """Make calls that use paths which the second node does not have; print the error of each as a JSON line."""
    import ray
    from ray.cluster_utils import Cluster

    source = rk.parquet(f"{folder}/data.parquet", x=["a", "b"], y="y")
    local, shared = rk.Run(storage=f"{folder}/runs"), rk.Run(storage="memory://runs")
    two: dict[str, Any] = {"scale": rk.Scale(workers=2), "verbose": 0}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    ray_command = str(Path(sys.executable).with_name("ray"))
    start = f"{ray_command} start --address={cluster.address} --num-cpus=2 --block"
    # on a busy machine, a node may take longer than the 30 s that Ray waits
    start = f"mount -t tmpfs tmpfs {folder} && ({start} || {start})"
    node = subprocess.Popen(["unshare", "--mount", "sh", "-c", start], start_new_session=True)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        cluster.wait_for_nodes()
        while sum(n["Alive"] for n in ray.nodes()) < 2:
            assert node.poll() is None
        model = dense("keras")
        calls = {
            "storage": lambda: rk.fit(model, [[1.0] * 8], [1.0], run=local, **two),
            "source": lambda: rk.fit(model, source, run=shared, **two),
            "evaluate": lambda: rk.evaluate(model, source, **two),
            "predict": lambda: rk.predict(model, source, scale=rk.Scale(workers=2)),
        }
        for name, call in calls.items():
            try:
                call()
            except rk.OptionError as error:
                print(json.dumps([name, str(error)]), flush=True)
    finally:
        ray.shutdown()
        with contextlib.suppress(ProcessLookupError):  # it did not start
            os.killpg(node.pid, 15)
        node.wait()
        cluster.shutdown()


def test_paths_that_only_the_driver_has_are_refused(forked: ForkServer, tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1.0] * 64, "b": [2.0] * 64, "y": [0, 1] * 32}), tmp_path / "data.parquet")
    ended = forked.run(main, str(tmp_path), timeout_s=300)
    assert ended.exit_code == 0, ended.output
    errors = dict(json.loads(line) for line in ended.output.splitlines() if line.startswith("["))
    assert errors.keys() == {"storage", "source", "evaluate", "predict"}, ended.output
    assert "`storage` must be a folder that all nodes share" in errors["storage"]
    assert all("data.parquet" in errors[name] for name in ("source", "evaluate", "predict"))
    assert [path.name for path in tmp_path.iterdir()] == ["data.parquet"]
