"""Two worker processes that are kept from one test to the next, so that a test need not start its own.

Ray Train starts the processes through the product's own `run_on_workers`; a test then runs on them exactly what it
would run on new ones, and the actor between them and the driver is kept, too. Tests of how a process starts or ends
use new ones. This is the only place where tests replace how the product starts processes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raykeras import inference, launch
from raykeras.checkpoint import RunFolder
from raykeras.desk import Desk, _Desk
from raykeras.group import run_on_workers, worst
from raykeras.options import Scale
from raykeras.patching import replaced

TWO = Scale(workers=2)
_CPUS_PER_WORKER = 0.01
_TIMEOUT_S = 300
_PEER_TIMEOUT_S = 30  # for the other workers once one has failed


class KeptWorkers:
    """Two worker processes that run one test after another.

    Args:
        folder: For Ray Train's own files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(str(folder))
        self._start()

    def _start(self) -> None:
        import ray
        from ray.util.queue import Queue

        options = {"num_cpus": 0}
        self._desk_actor = ray.remote(num_cpus=0)(_KeptDeskActor).remote(TWO.workers)
        self._jobs = [Queue(actor_options=options) for _ in range(TWO.workers)]
        self._results = Queue(actor_options=options)
        config = {"jobs": self._jobs, "results": self._results, "folder": self._folder}
        start = functools.partial(
            run_on_workers, _serve, config, scale=TWO, cpus_per_worker=_CPUS_PER_WORKER, folder=self._folder
        )

        def serve(results: Any) -> None:
            try:
                start()
            except BaseException as error:
                with contextlib.suppress(Exception):  # the session is over
                    results.put((0, None, error))

        self._thread = threading.Thread(target=serve, args=[self._results], daemon=True)
        self._thread.start()
        self._is_broken = False
        self._pids: list[int] = []
        for _ in range(TWO.workers):
            _, pid, error = self._results.get(timeout=_TIMEOUT_S)
            if error is not None:
                raise error
            self._pids.append(pid)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Runs here what is started on two workers within the block."""
        if self._is_broken:
            self.close()
            self._start()
        with (
            replaced(launch, "run_on_workers", self.run_on_workers),
            replaced(inference, "run_on_workers", self.run_on_workers),
            replaced(launch, "Desk", functools.partial(_KeptDesk, self._desk_actor)),
        ):
            yield

    def run_on_workers(
        self,
        work: Callable[[dict[str, Any]], Any],
        config: dict[str, Any],
        *,
        scale: Scale,
        cpus_per_worker: float,
        folder: RunFolder | None = None,
        waits: bool = True,
    ) -> Any:
        """See `raykeras.group.run_on_workers`."""
        from ray import cloudpickle
        from ray.util.queue import Empty

        assert scale == TWO
        assert not self._is_broken, "one training at a time"
        job = cloudpickle.dumps((work, config))
        for jobs in self._jobs:
            jobs.put(job)
        values: dict[int, Any] = {}
        failures: dict[int, BaseException] = {}
        self._is_broken = True  # until both are done
        while len(values) + len(failures) < TWO.workers:
            try:
                rank, value, error = self._results.get(timeout=_PEER_TIMEOUT_S if failures else _TIMEOUT_S)
            except Empty:
                if failures:  # the other one waits for it
                    raise worst(failures) from None
                raise TimeoutError(f"kept workers not done after {_TIMEOUT_S} s; {self._stacks()}") from None
            if error is None:
                values[rank] = value
            else:
                failures[rank] = error
        self._is_broken = False
        if failures:
            raise worst(failures)
        return values[0]

    def _stacks(self) -> str:
        """Return the stacks of the processes' threads."""
        for pid in self._pids:
            os.kill(pid, signal.SIGUSR1)
        time.sleep(1)
        return "\n\n".join(_stacks_file(self._folder, pid).read_text() for pid in self._pids)

    def close(self) -> None:
        """End the processes."""
        import ray

        ray.kill(self._desk_actor)
        for jobs in self._jobs:
            jobs.put(None)
        if not self._is_broken:
            self._thread.join()
        for queue in (*self._jobs, self._results):
            queue.shutdown(force=True)


class _KeptDesk(Desk):
    """A handle of the actor that is kept."""

    def __init__(self, actor: Any, num_ranks: int) -> None:
        import ray

        self._actor = actor
        ray.get(actor.begin.remote(num_ranks))

    def close(self) -> None:
        import ray

        ray.get(self._actor.end_run.remote())


class _KeptDeskActor(_Desk):
    """Serves one run after another, each from its initial state."""

    _run = 0

    async def begin(self, num_ranks: int) -> None:
        super().__init__(num_ranks)

    async def end_run(self) -> None:
        self._run += 1
        for meeting in self._meetings:
            meeting.is_called.set()

    async def await_call(self, number: int) -> None:
        run = self._run
        await super().await_call(number)
        if run != self._run:
            raise RuntimeError("the run is over")


def _stacks_file(folder: RunFolder, pid: int) -> Path:
    return Path(folder.path, f"stacks-{pid}.txt")


def _serve(config: dict[str, Any]) -> None:
    """Run jobs on a kept worker, each with TensorFlow's and Keras' state cleared before it."""
    import ray.train
    from ray import cloudpickle

    from raykeras.noise import import_tensorflow, quiet

    quiet()
    import_tensorflow()
    import keras
    import tf_keras

    from raykeras import worker

    # a process can join a TensorFlow cluster only once
    worker.make_strategy = functools.cache(worker.make_strategy)
    rank = ray.train.get_context().get_world_rank()
    stacks = _stacks_file(config["folder"], os.getpid()).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    config["results"].put((rank, os.getpid(), None))
    while (job := config["jobs"][rank].get()) is not None:
        work, job_config, value, error = None, None, None, None
        for package in (keras, tf_keras):
            package.backend.clear_session()
            gc.freeze()  # keeps `clear_session` from collecting garbage among all of TensorFlow's objects
        try:
            work, job_config = cloudpickle.loads(job)
            value = work(job_config)
        except Exception as raised:
            error = raised
        config["results"].put((rank, value, error))
