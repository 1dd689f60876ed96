"""Two worker processes that stay from one example to the next, so that each costs seconds.

The processes are Ray Train's, started by the product's own `run_on_workers`, and an example runs on
them exactly what it would run on new ones: only starting them is shared. `tests/test_workers.py`
starts its own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raykeras.checkpoint import RunFolder
from raykeras.group import run_on_workers, worst
from raykeras.options import Scale

TWO = Scale(workers=2)
_START_TIMEOUT_S = 300
_TIMEOUT_S = 120


class KeptWorkers:
    """Stands in for `run_on_workers` while two processes are kept.

    Args:
        folder: For Ray Train's own files.
    """

    def __init__(self, folder: Path) -> None:
        from ray.util.queue import Queue

        self._lost = False
        options = {"num_cpus": 0}
        self._jobs = [Queue(actor_options=options) for _ in range(TWO.workers)]
        self._results = Queue(actor_options=options)
        config = {"jobs": self._jobs, "results": self._results}
        start = functools.partial(
            run_on_workers, _serve, config, scale=TWO, cpus_per_worker=0.01, folder=RunFolder(str(folder))
        )

        def serve() -> None:
            try:
                start()
            except BaseException as error:
                self._results.put((0, None, error))

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        for _ in range(TWO.workers):
            _, _, error = self._results.get(timeout=_START_TIMEOUT_S)
            if error is not None:
                raise error

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

        assert scale == TWO
        job = cloudpickle.dumps((work, config))
        for jobs in self._jobs:
            jobs.put(job)
        assert not self._lost, "an earlier example did not come to its end"
        done: dict[int, Any] = {}
        failures: dict[int, BaseException] = {}
        self._lost = True
        while len(done) + len(failures) < TWO.workers:
            rank, value, error = self._results.get(timeout=_TIMEOUT_S)
            if error is None:
                done[rank] = value
            else:
                failures[rank] = error
        self._lost = False
        if failures:
            raise worst(failures)
        return done[0]

    def close(self) -> None:
        """Ends the processes."""
        for jobs in self._jobs:
            jobs.put(None)
        if not self._lost:
            self._thread.join()
        for queue in (*self._jobs, self._results):
            queue.shutdown(force=True)


def _serve(config: dict[str, Any]) -> None:
    """What a kept worker runs: one example after another, each as in a process of its own."""
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
    config["results"].put((rank, None, None))
    while (job := config["jobs"][rank].get()) is not None:
        for package in (keras, tf_keras):
            package.backend.clear_session()
        value, error = None, None
        try:
            work, given = cloudpickle.loads(job)
            value = work(given)
        except Exception as raised:
            error = raised
        config["results"].put((rank, value, error))
