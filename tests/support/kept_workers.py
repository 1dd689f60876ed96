"""Two worker processes that run one test after another, because starting new ones takes seconds.

raykeras' own `run_on_workers` starts the processes. A test runs on them exactly what it would run on new ones; the
coordinator's actor is reused as well. Tests of how a process starts or ends use new processes. Only this module
replaces how raykeras starts processes.
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

from raykeras.checkpoint.store import RunFolder
from raykeras.compat.patch import patched
from raykeras.core.config import Scale
from raykeras.driver import evaluate, launch
from raykeras.driver.worker_group import most_severe, run_on_workers
from raykeras.worker.coordinator import CoordinatorActor, RunCoordinator
from tests.support.graphs import skip_graph_optimization

TWO = Scale(workers=2)
_CPUS_PER_WORKER = 0.01
_TIMEOUT_S = 300
_PEER_TIMEOUT_S = 30  # wait for the other worker after a failure


class KeptWorkers:
    """Two worker processes that run one test after another.

    Args:
        folder: Folder for Ray Train's files and for stack traces.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(str(folder))
        self._start()

    def _start(self) -> None:
        import ray
        from ray.util.queue import Queue

        options = {"num_cpus": 0}
        self._coordinator_actor = ray.remote(num_cpus=0)(_KeptCoordinatorActor).remote(TWO.workers)
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
        """Run two-worker jobs on these processes while the block runs."""
        if self._is_broken:
            self.close()
            self._start()
        with (
            patched(launch, "run_on_workers", self.run_on_workers),
            patched(evaluate, "run_on_workers", self.run_on_workers),
            patched(launch, "RunCoordinator", functools.partial(_KeptCoordinator, self._coordinator_actor)),
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
        """See `raykeras.driver.worker_group.run_on_workers`."""
        from ray import cloudpickle
        from ray.util.queue import Empty

        assert scale == TWO
        assert not self._is_broken, "one training at a time"
        job = cloudpickle.dumps((work, config))
        for jobs in self._jobs:
            jobs.put(job)
        values: dict[int, Any] = {}
        failures: dict[int, BaseException] = {}
        self._is_broken = True  # until both workers have finished
        while len(values) + len(failures) < TWO.workers:
            try:
                rank, value, error = self._results.get(timeout=_PEER_TIMEOUT_S if failures else _TIMEOUT_S)
            except Empty:
                if failures:  # the other worker waits for the failed one
                    raise most_severe(failures) from None
                raise TimeoutError(f"workers not finished after {_TIMEOUT_S} s; {self._stacks()}") from None
            if error is None:
                values[rank] = value
            else:
                failures[rank] = error
        self._is_broken = False
        if failures:
            raise most_severe(failures)
        return values[0]

    def _stacks(self) -> str:
        """Return the stack traces of all threads of the processes."""
        for pid in self._pids:
            os.kill(pid, signal.SIGUSR1)
        time.sleep(1)
        return "\n\n".join(_stacks_file(self._folder, pid).read_text() for pid in self._pids)

    def close(self) -> None:
        """End the processes."""
        import ray

        ray.kill(self._coordinator_actor)
        for jobs in self._jobs:
            jobs.put(None)
        if not self._is_broken:
            self._thread.join()
        for queue in (*self._jobs, self._results):
            queue.shutdown(force=True)


class _KeptCoordinator(RunCoordinator):
    """A handle of the kept actor."""

    def __init__(self, actor: Any, num_ranks: int) -> None:
        import ray

        self._actor = actor
        ray.get(actor.begin.remote(num_ranks))

    def close(self) -> None:
        import ray

        ray.get(self._actor.end_run.remote())


class _KeptCoordinatorActor(CoordinatorActor):
    """An actor that serves one run after another, each from the initial state."""

    _run = 0

    async def begin(self, num_ranks: int) -> None:
        super().__init__(num_ranks)

    async def end_run(self) -> None:
        self._run += 1
        for round_ in self._rounds:
            round_.is_called.set()

    async def await_round(self, number: int) -> None:
        run = self._run
        await super().await_round(number)
        if run != self._run:
            raise RuntimeError("the run is over")


def _stacks_file(folder: RunFolder, pid: int) -> Path:
    return Path(folder.path, f"stacks-{pid}.txt")


def _serve(config: dict[str, Any]) -> None:
    """Run jobs on a kept worker; clear the state of TensorFlow and Keras before each."""
    import ray.train
    from ray import cloudpickle

    from raykeras.compat.quiet import import_tensorflow, quiet

    quiet()
    import_tensorflow()
    import keras
    import tf_keras

    from raykeras.worker import train

    skip_graph_optimization()

    # a process can join a TensorFlow cluster only once
    train.make_strategy = functools.cache(train.make_strategy)
    rank = ray.train.get_context().get_world_rank()
    stacks = _stacks_file(config["folder"], os.getpid()).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    config["results"].put((rank, os.getpid(), None))
    while (job := config["jobs"][rank].get()) is not None:
        work, job_config, value, error = None, None, None, None
        for package in (keras, tf_keras):
            package.backend.clear_session()
            gc.freeze()  # speeds up the garbage collection of `clear_session`
        try:
            work, job_config = cloudpickle.loads(job)
            value = work(job_config)
        except Exception as exception:
            error = exception
        config["results"].put((rank, value, error))
