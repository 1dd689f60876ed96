"""Processes with TensorFlow, Keras, tf_keras and Ray imported, for tests that kill or configure their process.

Importing takes seconds, but a process that is forked after the imports starts at once. The server imports TensorFlow
without starting it, since TensorFlow's threads do not survive a fork.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        exit_code: The exit status, or the negative number of the signal that killed it.
        output: Its stdout and stderr.
    """

    exit_code: int
    output: str


class ForkServer:
    """Runs functions one at a time, each in a forked process, while the `with` block runs."""

    def __enter__(self) -> ForkServer:
        command = [sys.executable, "-m", "tests.support.fork_server"]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 240.0) -> Ended:
        """Run a function in a forked process.

        Args:
            function: Module-level function.
            *args: Picklable arguments.
            timeout_s: Seconds after which the process is killed.

        Raises:
            TimeoutError: If the process was killed; the message contains its output.
        """
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None and stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "output")
            pickle.dump((function, args, str(output)), stdin)
            stdin.flush()
            pid = int(stdout.readline())
            in_time, _, _ = select.select([stdout], [], [], timeout_s)
            if not in_time:
                os.kill(pid, signal.SIGKILL)
            exit_code = os.waitstatus_to_exitcode(int(stdout.readline()))
            if not in_time:
                raise TimeoutError(f"not finished after {timeout_s:g} s:\n{output.read_text()}")
            return Ended(exit_code, output.read_text())


def _serve() -> None:
    import tests.support.preloaded  # noqa: F401

    requests, replies = sys.stdin.buffer, os.dup(1)
    while True:
        try:
            function, args, output = pickle.load(requests)
        except EOFError:
            return
        pid = os.fork()
        if pid == 0:
            _run(function, args, output)
        os.write(replies, b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(replies, b"%d\n" % status)


def _run(function: Callable[..., Any], args: tuple[Any, ...], output: str) -> None:
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        function(*args)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        traceback.print_exc()
    finally:
        import ray

        ray.shutdown()  # `os._exit` skips exit handlers
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
