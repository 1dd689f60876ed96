"""An elastic run on two nodes, one of which goes in the middle of an epoch and comes back, or is told to go.

    python -m tests.two_nodes STORAGE (lost | drained)

Prints the events that tell of it, as JSON lines.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import raykeras as rk
from tests.resuming import fit

EPOCHS = 12
_STEP_S = 0.3  # so that a node can go in the middle of an epoch


def slow() -> Any:
    import keras

    class Slow(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            time.sleep(_STEP_S)

    return Slow()


class TwoNodes(rk.DriverCallback):
    """A cluster whose second node goes after the second epoch began, and comes back when training went on."""

    def __init__(self, how: str) -> None:
        from ray.cluster_utils import Cluster

        self._how = how
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
        self._second = self._cluster.add_node(num_cpus=2)
        self._cluster.wait_for_nodes()
        self._steps = -1
        self._closed = threading.Event()
        self.address = self._cluster.address

    def on_event(self, event: rk.events.Event) -> None:
        if isinstance(event, rk.events.BatchEnded):
            if event.epoch == 1 and event.step == 2 and self._steps < 0:
                self._steps = 0
                threading.Thread(target=self._take_away).start()
            return
        if isinstance(event, rk.events.RunRestarted) and event.workers == 1:
            threading.Thread(target=self._bring_back, daemon=True).start()
        print(json.dumps(event.as_dict()), flush=True)

    def close(self) -> None:
        """Ends all its nodes, and lets other processes of this machine no longer find them."""
        import ray._common.utils

        self._closed.set()
        self._cluster.shutdown()
        ray._common.utils.reset_ray_address()

    def _take_away(self) -> None:
        if self._how == "lost":
            self._cluster.remove_node(self._second, allow_graceful=False)
            return
        from ray._private.state import state
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        assert state is not None
        preempted = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        node = self._second.node_id
        client = GcsClient(address=self.address)
        accepted, why = client.drain_node(node, preempted, "spot", int(time.time() * 1000) + 30_000)
        assert accepted, why

    def _bring_back(self) -> None:
        if self._how == "drained":
            self._cluster.remove_node(self._second, allow_graceful=False)
        import ray._private.utils

        ray._private.utils.set_sigterm_handler = lambda handler: None  # which only the main thread may set
        self._cluster.add_node(num_cpus=2)
        self._closed.wait()  # a node ends with the thread that started it


def main() -> None:
    import ray

    nodes = TwoNodes(sys.argv[2])
    ray.init(address=nodes.address, log_to_driver=False)
    scale = rk.Scale(workers=(1, 2), cpus_per_worker=2)
    try:
        result = fit(sys.argv[1], "run", [slow(), nodes], scale=scale, dropout=0, epochs=EPOCHS)
        print(json.dumps({"history": result.history}))
    finally:
        ray.shutdown()
        nodes.close()


if __name__ == "__main__":
    main()
