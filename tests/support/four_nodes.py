"""Four workers on four nodes of a cluster: a fixed number of them, spread; and an elastic run that loses two nodes.

Prints the events of each run as JSON lines, and its history as the last line.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import raykeras as rk
from tests.support.resuming import fit, slow
from tests.support.two_nodes import HEALTH_CHECKS

EPOCHS = 10
"""Enough for training to last until the nodes have come back."""

_STEP_S = 0.3
_NODES = 4


class FourNodes:
    """A cluster of a head and four nodes, each with room for one worker, while the `with` block runs."""

    def __enter__(self) -> FourNodes:
        from ray.cluster_utils import Cluster

        os.environ |= HEALTH_CHECKS
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        self.address = self._cluster.address
        self._closed = threading.Event()
        self._nodes = [self._add() for _ in range(_NODES)]
        self._cluster.wait_for_nodes()
        return self

    def __exit__(self, *error: object) -> None:
        import ray._common.utils

        self._closed.set()
        self._cluster.shutdown()
        ray._common.utils.reset_ray_address()

    def lose_two(self) -> None:
        for node in self._nodes[2:]:
            self._cluster.remove_node(node, allow_graceful=False)

    def add_two(self) -> None:
        """Add two nodes from a thread that keeps running, because a node ends with the thread that started it."""
        import ray._private.utils

        ray._private.utils.set_sigterm_handler = lambda handler: None  # only the main thread may set it

        def add_and_stay() -> None:
            self._nodes[2:] = [self._add(), self._add()]
            self._closed.wait()

        threading.Thread(target=add_and_stay, daemon=True).start()

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=2, resources={"slot": 1}, labels={"role": "train"})


class NodesLeave(rk.DriverCallback):
    """Removes two nodes after a step of the second epoch, and adds two once the others train."""

    def __init__(self, nodes: FourNodes) -> None:
        self._nodes, self._has_lost = nodes, False

    def on_event(self, event: rk.Event) -> None:
        if isinstance(event, rk.BatchEnded):
            if event.epoch == 1 and event.step == 2 and not self._has_lost:
                self._has_lost = True
                threading.Thread(target=self._nodes.lose_two).start()
            return
        if isinstance(event, rk.RunRestarted) and event.workers == 2:
            self._nodes.add_two()
        print(json.dumps(event.as_dict()), flush=True)


def reporting_node(folder: str) -> Any:
    """Return a callback that writes the id of each worker's node to a file named after its rank."""
    import keras

    class ReportsNode(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_begin(self, logs: Any = None) -> None:
            import ray

            rank = ray.train.get_context().get_world_rank()
            Path(folder, f"node-of-rank-{rank}").write_text(ray.get_runtime_context().get_node_id())

    return ReportsNode()


def main(storage: str, kind: str) -> None:
    """Train the run of a kind: "fixed" or "elastic"."""
    import ray

    with FourNodes() as nodes:
        ray.init(address=nodes.address, log_to_driver=False)
        try:
            callbacks = [reporting_node(storage)]
            if kind == "fixed":
                scale = rk.Scale(workers=4, cpus_per_worker=0.4, placement="spread", label_selector={"role": "train"})
            else:
                scale = rk.Scale(workers=(2, 4), cpus_per_worker=1, resources_per_worker={"slot": 1})
                callbacks += [slow(_STEP_S), NodesLeave(nodes)]
            result = fit(storage, kind, callbacks, scale=scale, dropout=0, epochs=EPOCHS)
            trainers = [node["NodeID"] for node in ray.nodes() if node["Labels"].get("role") == "train"]
            print(json.dumps({"history": result.history, "trainers": trainers}), flush=True)
        finally:
            ray.shutdown()
