"""Elastic runs on a cluster of two nodes, of which the second goes in mid-epoch.

Prints the runs' events as JSON lines, each run's followed by its history.
"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import raykeras as rk
from tests.support.resuming import fit, slow

EPOCHS = {"lost": 10, "drained": 3}
"""For each way in which the node goes; if it is lost, it comes back, for which training has to last."""

_STEP_S = 0.3
_NODE_CPUS = 2
_DRAIN_S = 30


class Nodes:
    """A cluster whose second node can go and come back. Ends with the `with` block."""

    def __enter__(self) -> Nodes:
        from ray.cluster_utils import Cluster

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
        ray._common.utils.reset_ray_address()  # which other processes of this machine would find

    def lose(self) -> None:
        self._cluster.remove_node(self._second, allow_graceful=False)

    def drain(self) -> None:
        """Announce that the node goes, as a cloud does before it takes back a spot instance."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        preempted = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + _DRAIN_S) * 1000)
        client = GcsClient(address=self.address)
        accepted, message = client.drain_node(self._second.node_id, preempted, "spot", deadline_ms)
        assert accepted, message

    def come_back(self) -> None:
        """Add a node, in a thread that stays, since the node would end with it."""
        import ray._private.utils

        ray._private.utils.set_sigterm_handler = lambda handler: None  # which only the main thread may set
        threading.Thread(target=self._add_and_stay, daemon=True).start()

    def _add_and_stay(self) -> None:
        self._add()
        self._closed.wait()

    def _add(self) -> None:
        self._second = self._cluster.add_node(num_cpus=_NODE_CPUS)


class NodeLeaves(rk.DriverCallback):
    """Lets the second node go after a step of the second epoch."""

    def __init__(self, nodes: Nodes, how: str) -> None:
        self._nodes, self._how, self._has_left = nodes, how, False

    def on_event(self, event: rk.events.Event) -> None:
        if isinstance(event, rk.events.BatchEnded):
            if event.epoch == 1 and event.step == 2 and not self._has_left:
                self._has_left = True
                leave = self._nodes.lose if self._how == "lost" else self._nodes.drain
                threading.Thread(target=leave).start()
            return
        if isinstance(event, rk.events.RunRestarted) and event.workers == 1 and self._how == "lost":
            self._nodes.come_back()
        print(json.dumps(event.as_dict()), flush=True)


def main(storage: str, names: list[str]) -> None:
    """Train a run for each name, "lost" or "drained", which says how the node goes."""
    import ray

    with Nodes() as nodes:
        ray.init(address=nodes.address, log_to_driver=False)
        try:
            for name in names:
                callbacks: list[Any] = [slow(_STEP_S), NodeLeaves(nodes, name)]
                scale = rk.Scale(workers=(1, 2), cpus_per_worker=2)
                result = fit(storage, name, callbacks, scale=scale, dropout=0, epochs=EPOCHS[name])
                print(json.dumps({"history": result.history}), flush=True)
        finally:
            ray.shutdown()
