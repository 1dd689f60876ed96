"""A simulated Ray cluster: nodes, actors, objects, placement groups and the workers that Ray Train starts."""

from __future__ import annotations

import inspect
import itertools
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tests.simulation.scheduler import Process, Scheduler, Waiter


class RayError(Exception):
    """Stands for `ray.exceptions.RayError`."""


class RayActorError(RayError):
    """Stands for `ray.exceptions.RayActorError`."""


class RayTaskError(RayError):
    """Stands for `ray.exceptions.RayTaskError`; `cause` is the exception."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


class RaySystemError(RayError):
    """Stands for `ray.exceptions.RaySystemError`."""


class WorkerGroupError(Exception):
    """Stands for `ray.train.WorkerGroupError`."""

    def __init__(self, worker_failures: Mapping[int, BaseException]) -> None:
        super().__init__(f"{len(worker_failures)} workers failed")
        self.worker_failures = dict(worker_failures)


class ControllerError(Exception):
    """Stands for `ray.train.ControllerError`."""

    controller_failure = ""


@dataclass(eq=False)
class Node:
    """A node of the cluster.

    Attributes:
        id: The node's ID.
        cpus: Its logical CPUs.
        free: Those that are not reserved.
        clock_offset_s: What its clock differs by.
        cut_until_s: When it can be reached again.
    """

    id: str
    cpus: float
    free: float
    is_alive: bool = True
    is_draining: bool = False
    clock_offset_s: float = 0.0
    cut_until_s: float = 0.0
    processes: list[Process] = field(default_factory=list)


class Ref:
    """A reference to an object that exists now or later."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster, self.number = cluster, number
        self.is_ready = False
        self.value: bytes = b""
        self.error: Exception | None = None
        self.waiters: list[Waiter] = []

    def __reduce__(self) -> Any:
        return _find_ref, (self.number,)

    def resolve(self, value: bytes = b"", error: Exception | None = None) -> None:
        if not self.is_ready:
            self.is_ready, self.value, self.error = True, value, error
            self.cluster.scheduler.wake_all(self.waiters)


class Actor:
    """An actor's process and instance."""

    def __init__(self, cluster: Cluster, number: int, process: Process) -> None:
        self.cluster, self.number, self.process = cluster, number, process
        self.instance: Any = None
        self.pending: dict[Ref, None] = {}  # in order
        process.at_exit.append(self._fail_pending)

    def call(self, method: str, args: bytes) -> Ref:
        """Send a call to the actor, which may arrive before or after others."""
        cluster, ref, caller = self.cluster, self.cluster.new_ref(), self.cluster.scheduler.process.node
        delay_s = cluster.delay_s(caller, self.process.node)
        cluster.scheduler.call_later(delay_s, lambda: self._receive(method, args, ref, caller))
        return ref

    def _receive(self, method: str, args: bytes, ref: Ref, caller: Node) -> None:
        if not self.process.is_alive:
            self._fail(ref)
            return
        self.pending[ref] = None
        self.cluster.scheduler.spawn(self.process, lambda: self._serve(method, args, ref, caller), method)

    def _serve(self, method: str, args: bytes, ref: Ref, caller: Node) -> None:
        value, error = b"", None
        try:
            value = pickle.dumps(_finish(getattr(self.instance, method)(*pickle.loads(args))))
        except Exception as raised:
            error = RayTaskError(raised)
        delay_s = self.cluster.delay_s(self.process.node, caller)
        self.cluster.scheduler.call_later(delay_s, lambda: self._reply(ref, value, error))

    def _reply(self, ref: Ref, value: bytes, error: Exception | None) -> None:
        self.pending.pop(ref, None)
        ref.resolve(value, error)

    def _fail_pending(self) -> None:
        for ref in self.pending:
            self._fail(ref)

    def _fail(self, ref: Ref) -> None:
        error = RayActorError("The actor died because its process or node was lost.")
        self.cluster.scheduler.call_later(self.cluster.detection_s(), lambda: ref.resolve(error=error))


class ActorHandle:
    """What users hold of an actor."""

    def __init__(self, actor: Actor) -> None:
        self.actor = actor

    def __getattr__(self, method: str) -> Any:
        if method.startswith("__"):
            raise AttributeError(method)
        return SimpleNamespace(remote=lambda *args: self.actor.call(method, pickle.dumps(args)))

    def __reduce__(self) -> Any:
        return _find_actor, (self.actor.number,)


class PlacementGroup:
    """Bundles of CPUs, reserved together as soon as all of them are free."""

    def __init__(self, cluster: Cluster, bundles: Sequence[Mapping[str, float]]) -> None:
        self.cluster, self.bundle_specs = cluster, [dict(bundle) for bundle in bundles]
        self.nodes: list[Node] = []
        self.is_removed = False
        cluster.groups.append(self)
        _job_of(cluster.scheduler.process).at_exit.append(lambda: cluster.remove_group(self))
        cluster.place_groups()

    def wait(self, timeout_s: float) -> bool:
        end = self.cluster.scheduler.now + timeout_s
        while not self.nodes and self.cluster.scheduler.now < end:
            self.cluster.scheduler.sleep(min(0.1, timeout_s))
        return bool(self.nodes)


@dataclass
class TrainRun:
    """The workers of one run of Ray Train.

    Attributes:
        name: Name of the run.
        processes: The workers by rank.
        returned: The ranks whose function has returned.
        failures: The exceptions of failed workers by rank.
        collectives: Collective operations of the workers by job.
    """

    name: str
    processes: list[Process] = field(default_factory=list)
    returned: set[int] = field(default_factory=set)
    failures: dict[int, BaseException] = field(default_factory=dict)
    is_stopped: bool = False
    waiters: list[Waiter] = field(default_factory=list)
    collectives: dict[Any, Any] = field(default_factory=dict)


class Cluster:
    """The cluster of a simulation.

    Args:
        scheduler: Runs its processes.
        nodes: CPUs of each node.
    """

    def __init__(self, scheduler: Scheduler, nodes: Sequence[float]) -> None:
        self.scheduler, self.random = scheduler, scheduler.random
        self.nodes: list[Node] = []
        self.groups: list[PlacementGroup] = []
        self.runs: list[TrainRun] = []
        self._numbers = itertools.count()
        self._refs: dict[int, Ref] = {}
        self._actors: dict[int, Actor] = {}
        for cpus in nodes:
            self.add_node(cpus)
        _clusters[:] = [self]

    def delay_s(self, sender: Node, receiver: Node) -> float:
        """Return the time that a message takes; a few take long, and some until a node can be reached again."""
        seconds = self.random.random()
        seconds = 0.2 + seconds if self.random.random() < 0.02 else 0.004 * seconds
        if sender is receiver:
            return seconds
        return seconds + max(0.0, sender.cut_until_s - self.scheduler.now, receiver.cut_until_s - self.scheduler.now)

    def detection_s(self) -> float:
        """Return the time until the loss of a process or node is noticed."""
        return self.random.uniform(0.05, 2.0)

    def add_node(self, cpus: float) -> Node:
        """Add a node."""
        node = Node(f"node{next(self._numbers)}", cpus, cpus)
        self.nodes.append(node)
        self.place_groups()
        return node

    def kill_node(self, node: Node) -> None:
        """End a node and everything on it."""
        node.is_alive = False
        self.scheduler.note(f"{node.id} is lost")
        for process in node.processes:
            self.scheduler.kill(process)

    def cut_off(self, node: Node, seconds: float) -> None:
        """Let no message reach or leave a node for some time; if Ray notices it, the node is lost after that."""
        node.cut_until_s = self.scheduler.now + seconds
        noticed_after_s = self.detection_s()
        if noticed_after_s < seconds:
            self.scheduler.call_later(noticed_after_s, lambda: self._give_up(node))
            self.scheduler.call_later(seconds, lambda: self.kill_node(node))

    def _give_up(self, node: Node) -> None:
        for run in self.runs:
            for rank, process in enumerate(run.processes):
                if process.node is node and process.is_alive and rank not in run.returned:
                    run.failures.setdefault(rank, RayActorError("The actor died because its node has died."))
                    self.scheduler.wake_all(run.waiters)

    def end_once_reachable(self, process: Process) -> None:
        """End a process once its node can be reached."""
        self.scheduler.call_later(max(0.0, process.node.cut_until_s - self.scheduler.now), lambda: self.end(process))

    def usable_nodes(self) -> list[Node]:
        """Return the nodes on which something can be started."""
        return [
            node
            for node in self.nodes
            if node.is_alive and not node.is_draining and node.cut_until_s <= self.scheduler.now
        ]

    def start_process(self, name: str, node: Node, job: Process | None) -> Process:
        """Return a new process on a node."""
        process = Process(name, node, job)
        process.is_alive = node.is_alive
        node.processes.append(process)
        if job is not None:
            job.at_exit.append(lambda: self.scheduler.call_later(self.random.uniform(0, 5), lambda: self.end(process)))
        return process

    def end(self, process: Process) -> None:
        """End a process."""
        self.scheduler.kill(process)

    def put(self, value: Any) -> Ref:
        """Store an object in the current process, with which it is lost."""
        ref = self.new_ref()
        ref.resolve(pickle.dumps(value))
        owner = self.scheduler.process
        owner.at_exit.append(lambda: setattr(ref, "error", RayError("The object's owner died.")))
        return ref

    def get(self, refs: Any) -> Any:
        """Wait for objects and return them."""
        if isinstance(refs, list):
            return [self.get(ref) for ref in refs]
        while not refs.is_ready:
            self.scheduler.wait(refs.waiters)
        if refs.error is not None:
            raise refs.error
        return pickle.loads(refs.value)

    def is_ready_within(self, ref: Ref, timeout_s: float) -> bool:
        """Wait for an object; return False if the time was over first."""
        end = self.scheduler.now + timeout_s
        while not ref.is_ready and self.scheduler.now < end:
            self.scheduler.wait(ref.waiters, end - self.scheduler.now)
        return ref.is_ready

    def start_actor(self, cls: type, options: Mapping[str, Any], args: Any) -> ActorHandle:
        """Start an actor on the node of the caller if it is bound to it, or on any node."""
        caller = self.scheduler.process
        node = caller.node if "label_selector" in options else self.random.choice(self.usable_nodes() or [caller.node])
        process = self.start_process(cls.__name__, node, _job_of(caller))
        actor = Actor(self, next(self._numbers), process)
        actor.instance = cls(*args)
        self._actors[actor.number] = actor
        return ActorHandle(actor)

    def place_groups(self) -> None:
        """Reserve the bundles of waiting placement groups for which there is room."""
        for group in self.groups:
            if group.nodes or group.is_removed:
                continue
            free = {node.id: node.free for node in self.usable_nodes()}
            chosen = []
            for bundle in group.bundle_specs:
                fitting = [node for node in self.usable_nodes() if free[node.id] >= bundle.get("CPU", 0.0)]
                if not fitting:
                    break
                chosen.append(self.random.choice(fitting))
                free[chosen[-1].id] -= bundle.get("CPU", 0.0)
            if len(chosen) == len(group.bundle_specs):
                group.nodes = chosen
                for node in chosen:
                    node.free = free[node.id]

    def remove_group(self, group: PlacementGroup) -> None:
        """Free the bundles of a placement group."""
        if not group.is_removed:
            group.is_removed = True
            for node, bundle in zip(group.nodes, group.bundle_specs, strict=False):
                node.free += bundle.get("CPU", 0.0)
            self.place_groups()

    def run_on_workers(
        self, work: Callable[[Any], Any], config: Any, scaling_config: Any, run_config: Any, bundles: Any = None
    ) -> None:
        """Run `work(config)` on workers, as Ray Train does, until all have returned or one has failed."""
        scheduler, caller = self.scheduler, self.scheduler.process
        run, group = TrainRun(run_config.name), None
        self.runs.append(run)
        try:
            if bundles is None:
                group = PlacementGroup(self, [scaling_config.resources_per_worker] * scaling_config.num_workers)
                while not group.wait(1.0):
                    pass
                nodes = group.nodes
            else:
                nodes = [bundles.group.nodes[index] for index in bundles.indices]
            payload = pickle.dumps((work, config))
            for rank, node in enumerate(nodes):
                process = self.start_process(f"worker{rank}", node, _job_of(caller))
                process.globals |= {"rank": rank, "run": run}
                process.at_exit.append(lambda rank=rank: self._notice_loss(run, rank))
                run.processes.append(process)
                if not process.is_alive:
                    self._notice_loss(run, rank)
                scheduler.spawn(process, lambda rank=rank: self._work(run, rank, payload), "main")
            while len(run.returned) < len(nodes) and not run.failures and not run.is_stopped:
                scheduler.wait(run.waiters)
            for process in run.processes:
                self.end_once_reachable(process)
        finally:
            if group is not None:
                self.remove_group(group)
        if run.is_stopped:
            raise RayActorError("The actor was killed by `ray.kill`.")
        if run.failures:
            raise WorkerGroupError(run.failures)

    def stop_run(self, name: str) -> None:
        """End the workers of a run."""
        for run in self.runs:
            if run.name == name:
                run.is_stopped = True
                self.scheduler.wake_all(run.waiters)

    def new_ref(self) -> Ref:
        """Return a reference to an object that does not exist yet."""
        ref = Ref(self, next(self._numbers))
        self._refs[ref.number] = ref
        return ref

    def _work(self, run: TrainRun, rank: int, payload: bytes) -> None:
        self.scheduler.sleep(self.random.uniform(0.2, 1.5))
        try:
            work, config = pickle.loads(payload)
            work(config)
        except Exception as error:
            run.failures[rank] = error
        run.returned.add(rank)
        self.scheduler.wake_all(run.waiters)

    def _notice_loss(self, run: TrainRun, rank: int) -> None:
        def notice() -> None:
            if rank not in run.returned:
                run.failures.setdefault(rank, RayActorError("The actor died because its process or node was lost."))
                self.scheduler.wake_all(run.waiters)

        self.scheduler.call_later(self.detection_s(), notice)


def _finish(value: Any) -> Any:
    """Return what a coroutine returns; its waits are those of the scheduler."""
    if not inspect.iscoroutine(value):
        return value
    try:
        value.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("The coroutine waits for something that is not simulated.")


def _job_of(process: Process) -> Process:
    return process if process.job is None else process.job


_clusters: list[Cluster] = []


def cluster() -> Cluster:
    """Return the cluster of the current simulation."""
    return _clusters[-1]


def _find_ref(number: int) -> Ref:
    return cluster()._refs[number]


def _find_actor(number: int) -> ActorHandle:
    return ActorHandle(cluster()._actors[number])
