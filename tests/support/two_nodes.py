"""An elastic run on a cluster of two nodes: the second node is lost, comes back, and is drained.

Prints the events of the run as JSON lines, and the history as the last line.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import raykeras as rk
from tests.support.resuming import fit, slow

EPOCHS = 12
"""Enough for training to last until the node has come back."""

_STEP_S = 0.3
HEALTH_CHECKS = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
"""A lost node is noticed after 3 s instead of 15."""

_NODE_CPUS = 2
_DRAIN_S = 30


class Nodes:
    """A cluster whose second node can be removed and added again, while the `with` block runs.

    Args:
        environment: Environment variables of the second node's processes.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(environment or {})

    def __enter__(self) -> Nodes:
        from ray.cluster_utils import Cluster

        os.environ |= HEALTH_CHECKS
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
        self.address = self._cluster.address
        self._closed = threading.Event()
        self._add()
        self._cluster.wait_for_nodes()
        return self

    def __exit__(self, *error: object) -> None:
        import ray._common.utils

        self._closed.set()
        self._cluster.shutdown()
        ray._common.utils.reset_ray_address()  # otherwise, other processes on this machine would find the address

    def lose(self) -> None:
        self._cluster.remove_node(self._second, allow_graceful=False)

    def drain(self) -> None:
        """Announce that the node will be removed, as a cloud provider does for a spot instance."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        preempted = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + _DRAIN_S) * 1000)
        client = GcsClient(address=self.address)
        accepted, message = client.drain_node(self._second.node_id, preempted, "spot", deadline_ms)
        assert accepted, message

    def come_back(self) -> None:
        """Add a node from a thread that keeps running, because the node ends with the thread that started it."""
        import ray._private.utils

        ray._private.utils.set_sigterm_handler = lambda handler: None  # only the main thread may set it
        threading.Thread(target=self._add_and_stay, daemon=True).start()

    def _add_and_stay(self) -> None:
        self._add()
        self._closed.wait()

    def _add(self) -> None:
        self._second = self._cluster.add_node(num_cpus=_NODE_CPUS, env_vars=self._environment)


class NodeLeaves(rk.DriverCallback):
    """Removes the second node after a step of the second epoch, and drains it once it trains again."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes, self._times_left, self._is_back = nodes, 0, False

    def on_event(self, event: rk.Event) -> None:
        if isinstance(event, rk.BatchEnded):
            if event.epoch == 1 and event.step == 2 and not self._times_left:
                self._leave(self._nodes.lose)
            elif self._is_back and self._times_left == 1:
                self._leave(self._nodes.drain)
            return
        if isinstance(event, rk.RunRestarted):
            self._is_back = event.workers == 2
            if self._times_left == 1 and not self._is_back:
                self._nodes.come_back()
        print(json.dumps(event.as_dict()), flush=True)

    def _leave(self, how: Callable[[], None]) -> None:
        self._times_left += 1
        threading.Thread(target=how).start()


def main(storage: str) -> None:
    """Train the run "elastic"."""
    import ray

    with Nodes() as nodes:
        ray.init(address=nodes.address, log_to_driver=False)
        try:
            callbacks: list[Any] = [slow(_STEP_S), NodeLeaves(nodes)]
            scale = rk.Scale(workers=(1, 2), cpus_per_worker=2)
            result = fit(storage, "elastic", callbacks, scale=scale, dropout=0, epochs=EPOCHS)
            print(json.dumps({"history": result.history}), flush=True)
        finally:
            ray.shutdown()
