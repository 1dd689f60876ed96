"""Two worker processes that stay from one test to the next, so that each costs seconds.

The processes are Ray Train's, started by the product's own `run_on_workers`, and a test runs on them
exactly what it would run on new ones: only starting them is shared. Tests of what ends with a process,
or begins with one, start their own.
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
from raykeras.group import run_on_workers, worst
from raykeras.options import Scale
from raykeras.patching import replaced

TWO = Scale(workers=2)
_CPUS_PER_WORKER = 0.01
_START_TIMEOUT_S = 300
_TIMEOUT_S = 300
_FOLLOWS_S = 30  # for which one that did not fail is waited for


class KeptWorkers:
    """Stands in for `run_on_workers` while two processes are kept.

    Args:
        folder: For Ray Train's own files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(str(folder))
        self._start()

    def _start(self) -> None:
        from ray.util.queue import Queue

        options = {"num_cpus": 0}
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
                with contextlib.suppress(Exception):  # nobody waits for them any longer
                    results.put((0, None, error))

        self._thread = threading.Thread(target=serve, args=[self._results], daemon=True)
        self._thread.start()
        self._lost = False
        self._pids: list[int] = []
        for _ in range(TWO.workers):
            _, pid, error = self._results.get(timeout=_START_TIMEOUT_S)
            if error is not None:
                raise error
            self._pids.append(pid)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Lets what two workers do within it be done by these."""
        if self._lost:  # an earlier test did not come to its end
            self.close()
            self._start()
        with (
            replaced(launch, "run_on_workers", self.run_on_workers),
            replaced(inference, "run_on_workers", self.run_on_workers),
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
        """As `raykeras.group.run_on_workers`."""
        from ray import cloudpickle
        from ray.util.queue import Empty

        assert scale == TWO
        assert not self._lost, "these are for one training at a time"
        job = cloudpickle.dumps((work, config))
        for jobs in self._jobs:
            jobs.put(job)
        done: dict[int, Any] = {}
        failures: dict[int, BaseException] = {}
        self._lost = True
        while len(done) + len(failures) < TWO.workers:
            try:
                rank, value, error = self._results.get(timeout=_FOLLOWS_S if failures else _TIMEOUT_S)
            except Empty:
                if failures:  # the other waits for the one that failed
                    raise worst(failures) from None
                raise TimeoutError(f"kept workers did not end within {_TIMEOUT_S} s; {self._stacks()}") from None
            if error is None:
                done[rank] = value
            else:
                failures[rank] = error
        self._lost = False
        if failures:
            raise worst(failures)
        return done[0]

    def _stacks(self) -> str:
        """What the threads of the processes are at."""
        for pid in self._pids:
            os.kill(pid, signal.SIGUSR1)
        time.sleep(1)
        return "\n\n".join(stacks_of(self._folder, pid).read_text() for pid in self._pids)

    def close(self) -> None:
        """Ends the processes."""
        for jobs in self._jobs:
            jobs.put(None)
        if not self._lost:
            self._thread.join()
        for queue in (*self._jobs, self._results):
            queue.shutdown(force=True)


def stacks_of(folder: RunFolder, pid: int) -> Path:
    """Where a process writes its stacks when it is asked for them."""
    return Path(folder.path, f"stacks-{pid}.txt")


def _serve(config: dict[str, Any]) -> None:
    """What a kept worker runs: one test after another, each as in a process of its own."""
    import ray.train
    from ray import cloudpickle

    from raykeras.noise import import_tensorflow, quiet

    quiet()
    import_tensorflow()
    import keras
    import tf_keras

    from raykeras import worker

    # a process can join a cluster of TensorFlow's only once
    worker.make_strategy = functools.cache(worker.make_strategy)
    rank = ray.train.get_context().get_world_rank()
    faulthandler.register(signal.SIGUSR1, file=stacks_of(config["folder"], os.getpid()).open("w"), all_threads=True)
    config["results"].put((rank, os.getpid(), None))
    while (job := config["jobs"][rank].get()) is not None:
        work, given, value, error = None, None, None, None
        for package in (keras, tf_keras):
            package.backend.clear_session()
            gc.freeze()  # or it would look through all of TensorFlow, each time
        try:
            work, given = cloudpickle.loads(job)
            value = work(given)
        except Exception as raised:
            error = raised
        config["results"].put((rank, value, error))
