"""Training in a notebook's kernel, which interrupts it with SIGINT while its output is being written."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.manager import KernelManager, start_new_kernel

_TIMEOUT_S = 120
_INTERRUPTS = 3
_EPOCHS = 100  # more than are trained before the last interrupt
_BUILD = """
import keras, numpy as np, raykeras as rk

def build():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model

x = np.arange(4000, dtype="float32").reshape(1000, 4) / 4000
options = dict(x=x, y=x.sum(1), batch_size=10, shuffle=False)

def fit(epochs, **others):
    return rk.fit(build, **options, epochs=epochs, run=rk.Run(storage="runs", name="run"), **others)
"""


class Kernel:
    """A kernel that runs one cell at a time."""

    def __init__(self, manager: KernelManager, client: Any) -> None:
        self._manager, self._client = manager, client
        self.output = ""

    def run(self, code: str, interrupt_after: str = "") -> dict[str, Any]:
        """Run a cell; return the kernel's reply.

        Args:
            code: The cell.
            interrupt_after: Output after which to interrupt it.
        """
        message_id, deadline = self._client.execute(code), time.monotonic() + _TIMEOUT_S
        self.output, is_idle = "", False
        while not is_idle:
            assert time.monotonic() < deadline, self.output[-2000:]
            try:
                message = self._client.get_iopub_msg(timeout=1)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != message_id:
                continue
            content = message["content"]
            self.output += content.get("text", "") + content.get("data", {}).get("text/html", "")
            self.output += "\n".join(content.get("traceback", ()))
            is_idle = content.get("execution_state") == "idle"
            if interrupt_after and interrupt_after in self.output:
                interrupt_after = ""
                self._manager.interrupt_kernel()
        while True:
            reply = self._client.get_shell_msg(timeout=_TIMEOUT_S)
            if reply["parent_header"].get("msg_id") == message_id:
                return reply["content"]  # type: ignore[no-any-return]


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Kernel]:
    manager, client = start_new_kernel(cwd=str(tmp_path))
    yield Kernel(manager, client)
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_interrupted_cell_saves_run_and_resumes(kernel: Kernel) -> None:
    assert kernel.run(_BUILD)["status"] == "ok", kernel.output
    for _ in range(_INTERRUPTS):
        reply = kernel.run("fit(100_000, verbose=1)", interrupt_after="loss")
        assert reply.get("ename") == "KeyboardInterrupt", kernel.output
        assert "can be resumed from" in reply["evalue"]
        assert len("\n".join(reply["traceback"]).splitlines()) <= 15, reply["traceback"]
        assert "reading metadata …" in kernel.output
        assert "Error" not in kernel.output
        assert "ignored" not in kernel.output
    compared = f"""
losses = fit({_EPOCHS}, verbose=0).history["loss"]
expected = build().fit(**options, epochs={_EPOCHS}, verbose=0).history["loss"]
np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-9)
"""
    assert kernel.run(compared)["status"] == "ok", kernel.output
