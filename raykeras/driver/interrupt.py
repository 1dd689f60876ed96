"""Signals that end a run: SIGINT (Ctrl-C), SIGTERM (a cluster manager), SIGHUP (a closed terminal).

The first signal asks the workers to finish the step, save a checkpoint and exit; see `raykeras.worker.coordinator`. A
second signal, or one before the first step, exits immediately.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from raykeras.core import events
from raykeras.core.events import Event
from raykeras.worker.coordinator import StepAction

_JOIN_S = 5.0


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """Handles signals while a run trains. Has no effect outside of the main thread, where Python handles no signals.

    Attributes:
        signal: The first signal received; None if there was none.
        error: An exception of a driver callback, which ends the run as a signal does; None if there was none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.error: BaseException | None = None
        self._request: Callable[[StepAction], None] | None = None
        self._has_stepped = False
        self._received: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # safe to use in a signal handler

    @property
    def is_requested(self) -> bool:
        return self.signal is not None or self.error is not None

    def watch(self, event: Event) -> None:
        """Track from the run's events whether the workers have made a step."""
        if isinstance(event, events.BatchEnded | events.EpochEnded):
            self._has_stepped = True
        elif isinstance(event, events.WorkerFailed | events.RunRestarted):
            self._has_stepped = False

    def exception(self, text: str) -> BaseException:
        """Return what an interrupted run raises; after a signal, it ends a process with the signal's exit status."""
        if self.error is not None:
            return self.error
        return KeyboardInterrupt(text) if self.signal in (None, signal.SIGINT) else SystemExit(128 + self.signal)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals while the block runs, except those that the process ignores."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.getsignal(number) for number in _SIGNALS}
        previous = {number: handler for number, handler in previous.items() if handler not in (None, signal.SIG_IGN)}

        def restore() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        def handle(number: int, frame: Any) -> None:  # must neither print nor block
            restore()
            self.signal = number
            self._received.put(number)
            if not self._has_stepped:
                raise self.exception("")  # a destructor may swallow it; the workers are preempted anyway

        thread = threading.Thread(target=self._preempt_workers, name="raykeras-interrupt", daemon=True)
        thread.start()
        for number in previous:
            signal.signal(number, handle)
        try:
            yield
        finally:
            restore()
            self._received.put(None)
            thread.join(_JOIN_S)

    @contextlib.contextmanager
    def forwarding_to(self, request: Callable[[StepAction], None]) -> Iterator[None]:
        """Preempt the workers with `request` at a signal while the block runs."""
        self._request = request
        if self.is_requested:
            request("leave")
        try:
            yield
        finally:
            self._request = None

    def _preempt_workers(self) -> None:
        """Wait for a signal, preempt the workers, and print a message."""
        number = self._received.get()
        if number is None:
            return
        with contextlib.suppress(Exception):  # the workers have just ended
            if self._request is not None:
                self._request("leave")
        if self._has_stepped:
            message = (
                f"\nraykeras: received {signal.Signals(number).name}; finishing the step and saving. Send it again to "
                "exit immediately."
            )
            with contextlib.suppress(Exception):  # a notebook's stderr may raise in a thread
                print(message, file=sys.stderr, flush=True)
