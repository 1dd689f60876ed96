"""`raykeras doctor`, and a call, on a cluster of two nodes, of which the second has another Keras."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import ray

import raykeras as rk
from raykeras.cli.main import main
from tests.support.fork_server import ForkServer
from tests.support.models import TWO
from tests.support.two_nodes import Nodes


def examine_two_nodes(packages: str, storage: str) -> None:
    """Examine a cluster with storage that both nodes reach, and with storage that only the driver has."""
    environment = {"PYTHONPATH": f"{packages}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with Nodes(environment) as nodes:
        for url in (storage, "memory://runs"):
            try:
                main(["doctor", "--cluster", nodes.address, "--storage", url, "--quick", "--json"])
            except SystemExit as status:
                print(json.dumps({"exit_status": status.code}))
        os.environ["RAY_ADDRESS"] = nodes.address
        for version in (ray.__version__, "2.0.0"):
            ray.__version__ = version
            try:
                rk.fit(str, [[1.0]], [1.0], scale=TWO, run=rk.Run(storage=storage), verbose=0)
            except rk.ResourceError as error:
                print(f"refused: {error}")
            ray.shutdown()


def by_node(checks: list[dict[str, str]], name: str) -> dict[str, dict[str, str]]:
    """Return the checks of this name by node."""
    return {check["node"]: check for check in checks if check["name"] == name}


def test_nodes_of_a_cluster_are_compared(forked: ForkServer, tmp_path: Path) -> None:
    metadata = tmp_path / "packages" / "keras-3.14.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: keras\nVersion: 3.14.0\n")
    ended = forked.run(examine_two_nodes, str(tmp_path / "packages"), str(tmp_path / "runs"))
    refused, other_ray = [line for line in ended.output.splitlines() if line.startswith("refused: ")]
    shared, private = reports(ended.output)
    assert (shared["exit_status"], private["exit_status"]) == (1, 1)
    names = sorted(by_node(shared["checks"], "versions"))
    assert len(names) == 2
    versions = by_node(shared["checks"], "versions").values()
    assert sorted(check["status"] for check in versions) == ["fail", "pass"]
    assert any(check["found"].startswith("keras 3.14.0 (here ") for check in versions)
    assert {check["status"] for check in by_node(shared["checks"], "storage").values()} == {"pass"}
    assert not (tmp_path / "runs").exists()
    assert {check["status"] for check in by_node(shared["checks"], "ports").values()} == {"pass"}

    stored = by_node(private["checks"], "storage")
    assert stored.pop("")["status"] == "pass"
    assert sorted(stored) == names
    for check in stored.values():
        assert check["status"] == "fail"
        assert check["found"] == "memory://runs: the file that the driver wrote is not there"
        assert "Use a folder that all machines share" in check["remedy"]

    version = importlib.metadata.version("keras")
    assert refused.startswith("refused: All nodes of a cluster must have the driver's versions; node ")
    assert f" has keras 3.14.0 (here {version}). Install on the node: pip install keras=={version}. " in refused
    assert f" started with: Ray: {ray.__version__} " in other_ray and " started with: Ray: 2.0.0 " in other_ray


def reports(output: str) -> list[dict[str, Any]]:
    """Return what each call printed, with its exit status."""
    decoder, found, position = json.JSONDecoder(), [], 0
    while (start := output.find("{", position)) >= 0:
        value, position = decoder.raw_decode(output, start)
        found.append(value)
    return [report | status for report, status in zip(found[::2], found[1::2], strict=True)]
