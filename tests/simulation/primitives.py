"""The modules `threading`, `time`, `queue`, `asyncio` and `signal` as simulated processes see them.

They have what raykeras uses, and wait in the scheduler of the current simulation.
"""

from __future__ import annotations

import collections
import queue as real_queue
import signal as real_signal
from collections.abc import Callable, Iterable
from typing import Any

from tests.simulation.scheduler import Scheduler, Task, Waiter

_current: list[Scheduler] = []


def scheduler() -> Scheduler:
    """Return the scheduler of the current simulation."""
    return _current[-1]


def use(current: Scheduler) -> None:
    """Set the scheduler that the primitives wait in."""
    _current[:] = [current]


class Lock:
    def __init__(self) -> None:
        self._owner: Task | None = None
        self._waiters: list[Waiter] = []

    def acquire(self) -> bool:
        current = scheduler()
        current.preempt()
        while self._owner is not None:
            current.wait(self._waiters)
        self._owner = current.current
        return True

    def release(self) -> None:
        self._owner = None
        scheduler().wake_all(self._waiters)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: Any) -> None:
        self.release()


class Condition:
    def __init__(self) -> None:
        self._lock = Lock()
        self._waiters: list[Waiter] = []

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: Any) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        self._lock.release()
        is_woken = scheduler().wait(self._waiters, timeout)
        self._lock.acquire()
        return is_woken

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        end = None if timeout is None else scheduler().now + timeout
        while not (value := predicate()):
            left = None if end is None else end - scheduler().now
            if left is not None and left <= 0:
                return value
            self.wait(left)
        return value

    def notify_all(self) -> None:
        scheduler().wake_all(self._waiters)


class Event:
    def __init__(self) -> None:
        self._is_set = False
        self._waiters: list[Waiter] = []

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        scheduler().wake_all(self._waiters)

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        scheduler().preempt()
        return self._wait(timeout)

    def _wait(self, timeout: float | None = None) -> bool:
        end = None if timeout is None else scheduler().now + timeout
        while not self._is_set:
            left = None if end is None else end - scheduler().now
            if left is not None and left <= 0:
                break
            scheduler().wait(self._waiters, left)
        return self._is_set


class Thread:
    def __init__(
        self,
        target: Callable[..., Any] = lambda: None,
        name: str = "thread",
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        daemon: bool = False,
    ) -> None:
        self._target, self.name, self._args, self._kwargs, self.daemon = target, name, args, kwargs or {}, daemon
        self._task: Task | None = None

    def start(self) -> None:
        current = scheduler()
        self._task = current.spawn(current.process, lambda: self._target(*self._args, **self._kwargs), self.name)

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.is_over

    def join(self, timeout: float | None = None) -> None:
        end = None if timeout is None else scheduler().now + timeout
        while self._task is not None and not self._task.is_over:
            left = None if end is None else end - scheduler().now
            if left is not None and left <= 0:
                return
            scheduler().wait(self._task.waiters, left)


class Timer(Thread):
    def __init__(self, interval: float, function: Callable[[], Any]) -> None:
        super().__init__(self._run, "timer")
        self._interval, self._function, self._is_cancelled = interval, function, False

    def cancel(self) -> None:
        self._is_cancelled = True

    def _run(self) -> None:
        scheduler().sleep(self._interval)
        if not self._is_cancelled:
            self._function()


class ThreadingModule:
    Lock = Lock
    Condition, Event, Thread, Timer = Condition, Event, Thread, Timer

    @staticmethod
    def current_thread() -> Any:
        return scheduler().current

    @staticmethod
    def main_thread() -> Any:
        return scheduler().process.globals.get("main")


class TimeModule:
    """Its `time` is that of the node, which may jump; the others only go forward."""

    @staticmethod
    def time() -> float:
        process = scheduler().process
        return 1.7e9 + scheduler().now + process.node.clock_offset_s

    @staticmethod
    def monotonic() -> float:
        return scheduler().now

    perf_counter = monotonic

    @staticmethod
    def sleep(seconds: float) -> None:
        scheduler().sleep(seconds)


class SimpleQueue:
    def __init__(self) -> None:
        self._items: collections.deque[Any] = collections.deque()
        self._waiters: list[Waiter] = []

    def __class_getitem__(cls, item: Any) -> type:
        return cls

    def put(self, item: Any) -> None:
        self._items.append(item)
        scheduler().wake_all(self._waiters)

    def get(self) -> Any:
        scheduler().preempt()
        return self._get()

    def _get(self) -> Any:
        while not self._items:
            scheduler().wait(self._waiters)
        return self._items.popleft()


class QueueModule:
    SimpleQueue, Empty = SimpleQueue, real_queue.Empty


class _AsyncEvent(Event):
    async def wait(self) -> bool:
        return self._wait()


class _AsyncQueue(SimpleQueue):
    def put_nowait(self, item: Any) -> None:
        self.put(item)

    async def get(self) -> Any:
        return self._get()


class _Future:
    def __init__(self) -> None:
        self._event, self._value = Event(), None

    def set_result(self, value: Any) -> None:
        self._value = value
        self._event.set()

    def __await__(self) -> Any:
        self._event.wait()
        return self._value
        yield

    def create_future(self) -> _Future:
        return _Future()


class AsyncioModule:
    """For actors, each of whose calls runs in a thread of its own; they change only where the real ones wait."""

    Event, Queue = _AsyncEvent, _AsyncQueue

    @staticmethod
    def get_running_loop() -> Any:
        return _Future()


class SignalModule:
    """Signal handlers of the current process, which run in its main thread."""

    SIGINT, SIGTERM, SIGHUP, SIG_IGN = real_signal.SIGINT, real_signal.SIGTERM, real_signal.SIGHUP, real_signal.SIG_IGN
    SIG_DFL, Signals = real_signal.SIG_DFL, real_signal.Signals

    @staticmethod
    def signal(number: int, handler: Any) -> None:
        scheduler().process.globals.setdefault("handlers", {})[number] = handler

    @staticmethod
    def getsignal(number: int) -> Any:
        return scheduler().process.globals.get("handlers", {}).get(number, real_signal.SIG_DFL)
