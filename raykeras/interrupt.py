"""Ctrl-C: the first one finishes the step and saves, the second leaves at once.

Enters: SIGINT. Leaves: a wish for the workers; see `raykeras.agreement`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from raykeras.desk import Wish


class Interrupt:
    """What SIGINT does while a run trains. In other threads than the main one Python has no signals, and it does
    nothing.

    Attributes:
        is_requested: Whether it came.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._call: Callable[[Wish], None] | None = None

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handles the signal within it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def handle(number: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, before)
            print(
                "\nraykeras: interrupted; finishing the step and saving. Interrupt again to leave at once.",
                file=sys.stderr,
                flush=True,
            )
            self.is_requested = True
            threading.Thread(target=self._pass_on, daemon=True).start()  # a handler must not wait

        signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

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
        with contextlib.suppress(Exception):  # the workers have just ended
            if self._call is not None:
                self._call("leave")
