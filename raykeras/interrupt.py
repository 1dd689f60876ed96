"""Signals that end a run: SIGINT (Ctrl-C), SIGTERM (a cluster manager), SIGHUP (a closed terminal).

Enters: a signal. Leaves: the workers' wish to finish the step and save; see `raykeras.agreement`. A second signal, or
one before the first step, leaves at once.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from raykeras import events
from raykeras.desk import Wish
from raykeras.events import Event

_JOIN_S = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """What the signals do while a run trains. Only the main thread can handle them; in others they do nothing.

    Attributes:
        signal: The first that came; None if none did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._call: Callable[[Wish], None] | None = None
        self._has_stepped = False
        self._received: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # into which a signal handler may put

    @property
    def is_requested(self) -> bool:
        return self.signal is not None

    def watch(self, event: Event) -> None:
        """Note whether workers train, by the events of the run."""
        if isinstance(event, events.BatchEnded | events.EpochEnded):
            self._has_stepped = True
        elif isinstance(event, events.WorkerFailed | events.RunRestarted):
            self._has_stepped = False

    def exception(self, text: str) -> BaseException:
        """Return what a run that was interrupted raises; a process ends by it as after the signal."""
        return KeyboardInterrupt(text) if self.signal in (None, signal.SIGINT) else SystemExit(128 + self.signal)

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals within it, but for those that the process ignores."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def handle(number: int, frame: Any) -> None:  # which must neither print nor wait
            restore()
            self.signal = number
            self._received.put(number)
            if not self._has_stepped:
                raise self.exception("")  # and if that is swallowed, as in a destructor, the workers leave all the same

        thread = threading.Thread(target=self._pass_on, name="raykeras-interrupt", daemon=True)
        thread.start()
        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            restore()
            self._received.put(None)
            thread.join(_JOIN_S)

    @contextlib.contextmanager
    def reaching(self, call: Callable[[Wish], None]) -> Iterator[None]:
        """Within it, `call` reaches the workers."""
        self._call = call
        if self.is_requested:
            call("leave")
        try:
            yield
        finally:
            self._call = None

    def _pass_on(self) -> None:
        number = self._received.get()
        if number is None:
            return
        with contextlib.suppress(Exception):  # the workers have just ended
            if self._call is not None:
                self._call("leave")
        if self._has_stepped:
            text = f"\nraykeras: {signal.Signals(number).name}; finishing the step and saving. Again to leave at once."
            with contextlib.suppress(Exception):  # as a notebook's stderr raises now and then in a thread
                print(text, file=sys.stderr, flush=True)
