"""Runs the threads of simulated processes as greenlets, one at a time, in an order and at times drawn from a seed."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

_PREEMPTION = 0.05
"""Probability that another thread runs at a point where threads may change."""


class Deadlock(Exception):
    """All threads wait, and nothing will wake one."""


class OutOfTime(Exception):
    """The simulated time is over."""


class Process:
    """A simulated process.

    Attributes:
        name: Its name in traces.
        node: The node on which it runs.
        job: The driver that it belongs to: a process that outlives its driver is ended later.
        globals: Values of the process, such as its rank.
    """

    def __init__(self, name: str, node: Any, job: Process | None = None) -> None:
        self.name, self.node, self.job = name, node, job
        self.is_alive = True
        self.frozen: list[Task] | None = None  # threads that would run if the process were not stopped
        self.globals: dict[str, Any] = {}
        self.at_exit: list[Callable[[], None]] = []


class Task:
    """A thread of a simulated process."""

    def __init__(self, process: Process, function: Callable[[], Any], name: str, hub: Any) -> None:
        self.process, self.name = process, name
        self.token = 0  # number of waits; a wake-up is valid for one of them
        self.is_woken = False
        self.is_over = False
        self.waiters: list[Waiter] = []  # of `join`
        self.interrupts: list[Callable[[], None]] = []  # run in this thread once it continues, as signal handlers are
        self.greenlet = greenlet(function, hub)  # which continues when the thread ends


Waiter = tuple[Task, int]


class Scheduler:
    """Decides which thread runs next.

    Args:
        seed: Determines the order of threads, and everything else that `random` is used for.
        trace: Whether to keep a line for each switch in `lines`.
    """

    def __init__(self, seed: int, trace: bool = False) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.num_switches = 0
        self.lines: list[str] | None = [] if trace else None
        self.errors: list[tuple[str, BaseException]] = []  # exceptions that ended threads
        self.is_over = False
        self.current: Task | None = None
        self._ready: list[Task] = []
        self._timers: list[tuple[float, int, Any, int]] = []
        self._numbers = itertools.count()
        self._tasks: set[Task] = set()
        self._hub = getcurrent()

    def spawn(self, process: Process, function: Callable[[], Any], name: str) -> Task:
        """Start a thread of a process."""

        def run() -> None:
            try:
                function()
            except GreenletExit:
                return
            except BaseException as error:
                self.errors.append((f"{process.name}/{name}", error))
            task.is_over = True
            self._tasks.discard(task)
            self.wake_all(task.waiters)

        task = Task(process, run, name, self._hub)
        self._tasks.add(task)
        if process.is_alive:
            self._ready.append(task)
        return task

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        """Call a function that does not wait, outside of all processes."""
        heapq.heappush(self._timers, (self.now + delay_s, next(self._numbers), function, -1))

    def wait(self, waiters: list[Waiter] | None = None, timeout_s: float | None = None) -> bool:
        """Let other threads run until `wake` is called for this one; return False if the time was over first."""
        task = self._running()
        task.token += 1
        task.is_woken = False
        entry = task, task.token
        if waiters is not None:
            waiters.append(entry)
        if timeout_s is not None:
            heapq.heappush(self._timers, (self.now + max(0.0, timeout_s), next(self._numbers), task, task.token))
        self._switch(task)
        if waiters is not None and not task.is_woken and entry in waiters:
            waiters.remove(entry)
        return task.is_woken

    def wake(self, waiter: Waiter) -> None:
        """Let a thread continue that waits; does nothing if it no longer does."""
        task, token = waiter
        if task.token == token and not task.is_over:
            task.token += 1
            task.is_woken = True
            self._ready.append(task)

    def wake_all(self, waiters: list[Waiter]) -> None:
        """Let all threads continue that wait."""
        for waiter in waiters:
            self.wake(waiter)
        waiters.clear()

    def interrupt(self, task: Task, handler: Callable[[], None]) -> None:
        """Run a function in a thread as soon as it continues, and let it continue now."""
        task.interrupts.append(handler)
        self.wake((task, task.token))

    def sleep(self, seconds: float) -> None:
        """Let other threads run for some time."""
        end = self.now + seconds
        while self.wait(None, end - self.now):  # woken by a signal
            pass

    def preempt(self) -> None:
        """Perhaps let another thread run."""
        task = self._running()
        if self.random.random() < _PREEMPTION:
            self._ready.append(task)
            self._switch(task)

    def kill(self, process: Process) -> None:
        """End a process at once, without running any of its code."""
        if not process.is_alive:
            return
        process.is_alive = False
        self.note(f"{process.name} is killed")
        for function in process.at_exit:
            function()
        if self.current is not None and self.current.process is process:
            self._switch(self.current)

    def freeze(self, process: Process, seconds: float) -> None:
        """Stop a process for some time, as a machine does that swaps, or SIGSTOP."""

        def thaw() -> None:
            tasks, process.frozen = process.frozen or [], None
            self._ready += tasks

        if process.frozen is None:
            process.frozen = []
            self.call_later(seconds, thaw)

    def run(self, is_done: Callable[[], bool], until_s: float) -> None:
        """Run threads until a condition holds.

        Raises:
            Deadlock: No thread can run.
            OutOfTime: The time is over.
        """
        while not is_done():
            if self._ready:
                index = int(self.random.random() * len(self._ready))
                task = self._ready[index]
                self._ready[index] = self._ready[-1]
                self._ready.pop()
                if task.process.frozen is not None:
                    task.process.frozen.append(task)
                elif task.process.is_alive:
                    self._resume(task)
                continue
            if not self._timers:
                raise Deadlock(self.waiting())
            at, _, target, token = heapq.heappop(self._timers)
            if at > until_s:
                raise OutOfTime(self.waiting())
            if token == -1:
                self.now = max(self.now, at)
                target()
            elif target.token == token and target.process.is_alive:
                self.now = max(self.now, at)
                target.token += 1
                self._ready.append(target)

    def waiting(self) -> str:
        """Return where the threads that have not ended wait."""
        places = [f"{task.process.name}/{task.name} {_place(task)}" for task in self._tasks if task.process.is_alive]
        return "\n  ".join(["threads that wait:", *sorted(places)])

    def close(self) -> None:
        """End all threads."""
        self.is_over = True
        for task in list(self._tasks):
            if task.greenlet:
                task.greenlet.throw(GreenletExit)

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        if self.lines is not None:
            self.lines.append(f"{self.now:9.3f} {text}")

    @property
    def process(self) -> Process:
        """The process whose thread runs."""
        return self._running().process

    def _running(self) -> Task:
        if self.is_over or self.current is None:
            raise GreenletExit
        return self.current

    def _resume(self, task: Task) -> None:
        self.num_switches += 1
        self.current = task
        task.greenlet.switch()
        self.current = None

    def _switch(self, task: Task) -> None:
        self._hub.switch()
        if self.is_over:
            raise GreenletExit
        while task.interrupts:
            task.interrupts.pop(0)()


def _place(task: Task) -> str:
    """Return the functions of raykeras in which a thread waits, the innermost first."""
    frame, places = task.greenlet.gr_frame, []
    while frame is not None:
        if "/raykeras/" in frame.f_code.co_filename:
            places.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(places)
