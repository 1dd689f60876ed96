"""How many workers an elastic run has, and when that is to change.

Enters: a `Scale` with room to move, and the cluster as it is. Leaves: a number of workers before they start; and,
while they train, the wish that they save and leave, where a node is about to go or there is room for more of them.

Ray Train starts the workers and places them. Its own elastic policy is not used: it would leave no CPU to the tasks
that read the data, and ends workers in the middle of a step, to repeat all since the last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator

from raykeras.desk import Desk
from raykeras.orders import Orders

_LOG = logging.getLogger("raykeras")
_SETTLED_S = 5.0  # after which no more nodes are waited for
_WARN_S = 30.0
_POLL_S = 0.5
_LOOK_S = 2.0  # at nodes, while workers train


def wait_for_room(orders: Orders) -> int:
    """Waits until the least of a run's workers can be started; gives how many can."""
    import ray
    from ray.autoscaler.sdk import request_resources

    scale = orders.widest
    bundle = {"CPU": orders.room.cpus_per_worker, **({"GPU": scale.gpus_per_worker} if scale.gpus_per_worker else {})}
    with contextlib.suppress(Exception):  # where nothing scales by itself
        request_resources(bundles=[bundle] * scale.workers)
    seen, warned, begun = -1, False, time.monotonic()
    since = begun
    while True:
        found, now = min(_room(orders), scale.workers), time.monotonic()
        if found < scale.least:
            found = min(_room(orders, in_parts=True), scale.least)
        if found != seen:
            seen, since = found, now
        if found == scale.workers or (found >= scale.least and now - since >= _SETTLED_S):
            return found
        if not warned and now - begun > _WARN_S:
            warned = True
            nodes = sum(node["Alive"] for node in ray.nodes())
            _LOG.warning("raykeras waits for %d workers; the %d nodes have room for %d.", scale.least, nodes, found)
        time.sleep(_POLL_S)


@contextlib.contextmanager
def watched_world(orders: Orders, desk: Desk) -> Iterator[None]:
    """Has the workers leave, within it, where their nodes are about to go, or where there is room for more."""
    closed = threading.Event()

    def watch() -> None:
        roomy_since: float | None = None
        while not closed.wait(_LOOK_S):
            try:
                notes = desk.notes()
                ours = {facts.get("node_id") for facts in notes.values()}
                if ours & _draining():
                    _LOG.warning("raykeras: a node is about to go; the workers save and leave.")
                    return desk.call("leave")
                if len(notes) < orders.scale.workers or orders.scale.workers == orders.widest.workers:
                    continue
                roomy_since = (roomy_since or time.monotonic()) if _room(orders) > 0 else None
                if roomy_since and time.monotonic() - roomy_since >= orders.grow_after_s:
                    return desk.call("leave")
            except Exception:  # the workers, or the cluster, have just ended
                return None

    thread = threading.Thread(target=watch, name="raykeras-world", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()


def _room(orders: Orders, *, in_parts: bool = False) -> int:
    """Workers that could be started now, beside those that run, one CPU left for reading.

    Args:
        orders: What they would do.
        in_parts: Whether it may be the part of one that others leave, for which a task is made to fit.
    """
    import ray
    from ray._private.state import available_resources_per_node

    gpus_each, cpus_each = orders.scale.gpus_per_worker, orders.room.cpus_per_worker
    usable = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - _draining()
    found, fewest = 0, math.inf  # fewest workers less that leave room for a task on some node
    for node, resources in available_resources_per_node().items():
        if node not in usable:
            continue
        cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        fits = int((cpus + 1e-6) // cpus_each)
        fits = min(fits, int(gpus // gpus_each)) if gpus_each else fits
        found += fits
        if cpus >= 1:
            task = (round(cpus % 1, 4) if in_parts else 0) or 1
            fewest = min(fewest, max(0, math.ceil((task - (cpus - fits * cpus_each) - 1e-6) / cpus_each)))
    return found - (0 if fewest is math.inf else int(fewest))


def _draining() -> set[str]:
    """Nodes that are about to go."""
    from ray._private.state import state

    return set(state.get_draining_nodes())
