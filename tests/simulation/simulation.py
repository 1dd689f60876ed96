"""One simulated run from a seed: its options, its faults, and what is true at its end."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from greenlet import GreenletExit

from raykeras.checkpoint.store import RunFolder
from raykeras.core.config import Run, Scale
from raykeras.core.errors import CheckpointError, WorkerLostError
from raykeras.core.events import Event
from raykeras.data.streaming.resources import CpuBudget
from raykeras.driver.decisions import EpochDecisions
from raykeras.driver.event_log import RunLog
from raykeras.driver.interrupt import Interrupt
from raykeras.driver.restarts import resumed
from raykeras.driver.training import train_job
from raykeras.worker.entry import Packed
from raykeras.worker.job import Outcome, TrainJob
from tests.simulation import primitives, storage
from tests.simulation.checks import check, check_mark
from tests.simulation.cluster import Cluster, Node
from tests.simulation.scheduler import Process, Scheduler
from tests.simulation.training import CountedRows, CountingKeras

FOLDER = "sim://runs/run"
_MAX_S = 1000.0
_MAX_CALLS = 30
_FAULTS = (
    *("kill worker", "kill actor", "kill node", "kill driver", "lose driver's node", "drain node", "add node"),
    *("jump clock", "signal", "second driver", "freeze process", "cut off node"),
)


@dataclass(frozen=True)
class Scenario:
    """What a seed stands for.

    Attributes:
        nodes: CPUs of each node; the driver is on the first.
        data: The rows.
        epochs: Number of epochs.
        step_s: The longest time that a step takes.
        workers: The least and the most workers.
        spares: Whether workers stand by.
        checkpoint_every: As in `Run`.
        max_failures: As in `Run`.
        storage: How storage fails.
        faults: When and what else fails.
    """

    nodes: tuple[float, ...]
    data: CountedRows
    epochs: int
    step_s: float
    workers: tuple[int, int]
    spares: bool
    checkpoint_every: Any
    max_failures: int
    storage: storage.Faults
    faults: tuple[tuple[float, str], ...]

    @classmethod
    def of(cls, seed: int) -> Scenario:
        """Draw a scenario from a seed."""
        draw = random.Random(f"scenario {seed}")
        most = draw.randint(2, 4)
        is_elastic = most > 2 and draw.random() < 0.5
        nodes = [draw.randint(2, 4) for _ in range(draw.randint(2, 4))]
        times = [draw.uniform(0.0, 12.0) for _ in range(draw.choice([0, 1, 1, 2, 2, 3, 4, 6]))]
        faults = [(at, draw.choice(_FAULTS)) for at in times]
        epochs, step_s = draw.randint(1, 4), draw.choice([0.05, 0.2, 0.5])
        if is_elastic and draw.random() < 0.5:  # too few CPUs for most workers at first
            nodes, faults = [2, 1], [*faults, (draw.uniform(5.0, 10.0), "add node")]
            epochs, step_s = 4, 0.5
        is_faulty = draw.random() < 0.5
        return cls(
            nodes=tuple(map(float, nodes)),
            data=CountedRows(*draw.choice([(37, 8), (48, 8), (30, 5), (64, 16)])),
            epochs=epochs,
            step_s=step_s,
            workers=(2 if is_elastic else most, most),
            spares=draw.random() < 0.3,
            checkpoint_every=draw.choice(
                ["epoch", 1, 2, 3, timedelta(seconds=0.5), timedelta(seconds=2), "continuous"]
            ),
            max_failures=draw.choice([0, 1, 3, 100]),
            storage=storage.Faults(
                until_s=draw.uniform(0, 30.0) if is_faulty else 0.0,
                rate=draw.choice([0.0, 0.02, 0.2]),
                lost_answer_rate=draw.choice([0.0, 0.02, 0.1]),
                listing_delay_s=draw.choice([0.0, 0.0, 0.0, 2.0]),
                tears=draw.random() < 0.3,
            ),
            faults=tuple(sorted(faults)),
        )


@dataclass
class Call:
    """One call of `fit` by a simulated user.

    Attributes:
        process: The driver's process.
        token: With which it claimed the run's folder.
        handled: The events that handlers got.
        outcome: What it returned.
        error: What it raised.
    """

    process: Process
    token: str
    handled: list[Event] = field(default_factory=list)
    outcome: Outcome | None = None
    error: BaseException | None = None
    is_over: bool = False

    @property
    def is_completed(self) -> bool:
        return self.outcome is not None and not self.outcome.preempted


class Simulation:
    """A cluster, a storage and a user who calls `fit` again until training has ended.

    Args:
        seed: Number of the simulation.
        trace: Whether to keep a line for each thing that happens.
    """

    def __init__(self, seed: int, trace: bool = False) -> None:
        self.scenario = Scenario.of(seed)
        self.scheduler = Scheduler(seed, trace)
        primitives.use(self.scheduler)
        self.store = storage.Store(self.scenario.storage)
        storage.use(self.store)
        self.cluster = Cluster(self.scheduler, self.scenario.nodes)
        self.calls: list[Call] = []
        self.violations: list[str] = []
        self.store.on_write = lambda path: check_mark(self, path)
        self.is_over = False

    def run(self) -> None:
        """Run until the user has a result.

        Raises:
            AssertionError: Something is not as in an undisturbed run.
        """
        user = Process("user", Node("user", 0, 0))
        self.scheduler.spawn(user, self._call_until_completed, "main")
        for at, name in self.scenario.faults:
            self.scheduler.call_later(at, lambda name=name: self._inject(name))
        try:
            self.scheduler.run(lambda: self.is_over or bool(self.scheduler.errors), _MAX_S)
            check(self)
        finally:
            self.scheduler.close()

    def _call_until_completed(self) -> None:
        """Call `fit` until a call has trained to the end that no other one took the run from, and all are over."""
        while True:
            if all(call.is_over for call in self.calls):
                owner = self.store.objects.get("runs/run/owner", b"").decode()
                if any(call.is_completed and call.token == owner for call in self.calls):
                    break
                assert len(self.calls) < _MAX_CALLS, "no call completes"
                self._start_call()
            self.scheduler.sleep(self.scheduler.random.uniform(0.0, 3.0))
        self.is_over = True

    def _start_call(self) -> Call:
        nodes = self.cluster.usable_nodes() or [self.cluster.add_node(4.0)]
        while sum(node.cpus for node in self.cluster.usable_nodes()) < self.scenario.workers[0] + 1:
            self.cluster.add_node(4.0)
        number = len(self.calls)
        process = self.cluster.start_process(f"driver{number}", nodes[0], None)
        call = Call(process, f"token{number}")
        process.at_exit.append(lambda: setattr(call, "is_over", True))
        self.calls.append(call)
        process.globals["main"] = self.scheduler.spawn(process, lambda: self._fit(call), "main")
        return call

    def _fit(self, call: Call) -> None:
        try:
            call.outcome = self._train(call)
            self.scheduler.note(f"{call.process.name} returns")
        except GreenletExit:
            raise
        except BaseException as error:
            call.error = error
            self.scheduler.note(f"{call.process.name} raises {type(error).__name__}: {error}")
            if not isinstance(error, WorkerLostError | CheckpointError | KeyboardInterrupt | SystemExit):
                raise
        finally:
            call.is_over = True
        self.cluster.end(call.process)

    def _train(self, call: Call) -> Outcome:
        """Do what `fit` does once it has validated its arguments."""
        scenario = self.scenario
        least, most = scenario.workers
        options = {} if least == most else {"min_workers": least}
        scale = Scale(workers=most, spares=scenario.spares, idle_timeout_s=0.0, **options)
        run = Run(
            storage="sim://runs",
            name="run",
            checkpoint_every=scenario.checkpoint_every,
            max_failures=scenario.max_failures,
            monitor="loss",
            hang_timeout_s=60.0,
        )
        folder = RunFolder(FOLDER)
        job = TrainJob(
            dataclasses.replace(scenario.data, step_s=scenario.step_s),
            None,
            scenario.epochs,
            0,
            None,
            1,
            scale,
            run,
            folder,
            CpuBudget(1.0, 1.0),
            token=call.token,
            requested_scale=scale,
            grow_after_s=1.0,
        )
        resume_events: list[Event] = []
        job = resumed(job, resume_events.append)
        interrupt = Interrupt()
        decisions = EpochDecisions([], True, interrupt)
        folder.make()
        folder.claim(job.token)
        log = RunLog(folder, job.token)
        packed = Packed(CountingKeras(), b"", pickle.dumps([]), False)
        handlers: list[Callable[[Event], None]] = [log, call.handled.append]
        try:
            outcome, _ = train_job(job, None, [], packed, handlers, resume_events, interrupt, decisions)
        finally:
            log.close()
        return outcome

    def _inject(self, name: str) -> None:
        """Let something fail that exists at this moment."""
        random_, cluster = self.scheduler.random, self.cluster
        self.scheduler.note(f"fault: {name}")
        processes = [process for node in cluster.nodes for process in node.processes if process.is_alive]
        drivers = [process for process in processes if process.job is None]
        workers = [process for process in processes if "run" in process.globals]
        others = [node for node in cluster.usable_nodes() if all(driver.node is not node for driver in drivers)]
        if name == "kill worker" and workers:
            cluster.end(random_.choice(workers))
        elif name == "kill actor" and (actors := [p for p in processes if p.job is not None and p not in workers]):
            cluster.end(random_.choice(actors))
        elif name == "kill node" and others:
            cluster.kill_node(random_.choice(others))
            cluster.add_node(4.0)
        elif name == "kill driver" and drivers:
            cluster.end(random_.choice(drivers))
        elif name == "lose driver's node" and drivers:
            cluster.kill_node(random_.choice(drivers).node)
            cluster.add_node(4.0)
        elif name == "drain node" and others:
            node = random_.choice(others)
            node.is_draining = True
            self.scheduler.call_later(random_.uniform(1.0, 6.0), lambda: cluster.kill_node(node))
            cluster.add_node(4.0)
        elif name == "freeze process" and processes:
            self.scheduler.freeze(random_.choice(processes), random_.uniform(0.0, 10.0))
        elif name == "cut off node" and others:
            cluster.cut_off(random_.choice(others), random_.uniform(0.0, 5.0))
            cluster.add_node(4.0)
        elif name == "add node":
            cluster.add_node(4.0)
        elif name == "jump clock":
            random_.choice(cluster.nodes).clock_offset_s += random_.uniform(-3600.0, 3600.0)
        elif name == "signal" and drivers:
            self._signal(random_.choice(drivers))
        elif name == "second driver" and not self.is_over:
            self._start_call()

    def _signal(self, process: Process) -> None:
        number = primitives.SignalModule.SIGTERM
        handler = process.globals.get("handlers", {}).get(number)
        if callable(handler):
            self.scheduler.interrupt(process.globals["main"], lambda: handler(number, None))
        else:
            self.cluster.end(process)

    def events_in_log(self) -> list[dict[str, Any]]:
        """Return the lines of the stored `events.jsonl`."""
        data = self.store.objects.get("runs/run/events.jsonl", b"")
        return [json.loads(line) for line in data.decode().splitlines()]

    def describe(self) -> str:
        """Return the scenario in a line."""
        return str(dataclasses.asdict(self.scenario))


def failure_of(seed: int, trace: list[str] | None = None) -> str:
    """Run a simulation; return why it failed, or an empty string.

    Args:
        seed: Number of the simulation.
        trace: Receives a line for each thing that happens.
    """
    simulation = Simulation(seed, trace is not None)
    try:
        simulation.run()
    except Exception as error:
        return f"{type(error).__name__}: {error}\n  {simulation.describe()}"
    finally:
        if trace is not None:
            trace += simulation.scheduler.lines or []
    return ""
