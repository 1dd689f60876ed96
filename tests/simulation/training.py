"""Keras' `fit` with a model that only counts rows, in place of `raykeras.worker.train` and of what copies a model.

The model's weight is a hash of all global batches in their order, so that a row that is skipped, repeated or out of
order changes it. Its metric is a mean over the steps of an epoch. Callbacks, checkpoints and the resumption of an epoch
are the code of raykeras.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raykeras.checkpoint import store
from raykeras.checkpoint.serialization import from_json, to_json
from raykeras.checkpoint.snapshot import Restored
from raykeras.checkpoint.store import Checkpoint
from raykeras.core.error_context import user_code_error
from raykeras.core.errors import RaykerasError
from raykeras.data.plan import PassPlan
from raykeras.worker.callbacks import TrainingPreempted
from raykeras.worker.job import Outcome, TrainJob
from raykeras.worker.session import TrainingSession, WorkerContext
from tests.simulation.cluster import RayError, TrainRun
from tests.simulation.primitives import scheduler
from tests.simulation.scheduler import Waiter

_NUM_SHARDS = 8
_UNIT_ROWS = 7
_MODULUS = (1 << 61) - 1


@functools.cache
def _plan(num_rows: int, batch_size: int, epoch: int) -> PassPlan:
    units = [min(_UNIT_ROWS, num_rows - first) for first in range(0, num_rows, _UNIT_ROWS)]
    options = {"global_batch_size": batch_size, "num_shards": _NUM_SHARDS, "window_rows": 8, "epoch": epoch}
    return PassPlan(np.array(units), **options)


@functools.cache
def _rank_rows(num_rows: int, batch_size: int, epoch: int, rank: int, num_ranks: int) -> list[list[int]]:
    """Return the rows of a rank in each step of a pass."""
    plan = _plan(num_rows, batch_size, epoch)
    rows = plan.rank_rows(rank, num_ranks).tolist()
    return [rows[slice(*plan.batch_range(step, rank, num_ranks))] for step in range(plan.num_steps)]


def advance(weight: int, rows: list[int]) -> int:
    """Return the weight after a step with the rows of a global batch."""
    for row in rows:
        weight = (weight * 1_000_003 + row + 1) % _MODULUS
    return weight


def loss(weight: int) -> float:
    """Return the loss of a step."""
    return float(weight % 1009)


@functools.cache
def undisturbed(num_rows: int, batch_size: int, epochs: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the weight after each step of an undisturbed run on one worker, and the loss of each epoch."""
    weight, weights, losses = 0, [0], []
    for epoch in range(epochs):
        plan = _plan(num_rows, batch_size, epoch)
        total = 0.0
        for step in range(plan.num_steps):
            weight = advance(weight, plan.batch_rows(step).tolist())
            total += loss(weight)
            weights.append(weight)
        losses.append(total / plan.num_steps)
    return tuple(weights), tuple(losses)


@dataclass(frozen=True)
class CountedRows:
    """A `DataSpec` of numbered rows."""

    num_rows: int
    batch_size: int
    step_s: float = 0.1

    batch_spec = None
    ends_epochs = may_run_out = uses_ray_data = False
    can_restart = True

    @property
    def num_steps(self) -> int:
        return -(-self.num_rows // self.batch_size)

    @property
    def params(self) -> Mapping[str, Any]:
        return {"num_rows": self.num_rows, "batch_size": self.batch_size}

    @property
    def position(self) -> Mapping[str, Any]:
        shards = {"num_shards": _NUM_SHARDS, "window_rows": 8}
        return {"global_batch_size": self.batch_size, "order": "shuffled", "fingerprint": "rows", **shards}

    def with_shards(self, position: Mapping[str, Any]) -> CountedRows:
        return self

    def skip_to(self, epoch: int, step: int) -> CountedRows:
        return self

    def batch_num_rows(self, step: int) -> int:
        return self.batch_size

    def for_workers(self, num_workers: int, cpus_per_task: float) -> AbstractContextManager[CountedRows]:
        return nullcontext(self)

    def positions(self, step: int) -> range:
        """Return the positions of a step's rows in their pass."""
        first = step % self.num_steps * self.batch_size
        return range(first, min(first + self.batch_size, self.num_rows))

    def batches(self, rank: int, num_ranks: int, first_step: int) -> Iterator[list[int]]:
        """Yield a rank's rows in each step, from a step counted over all passes."""
        epoch, step = divmod(first_step, self.num_steps)
        while True:
            yield from _rank_rows(self.num_rows, self.batch_size, epoch, rank, num_ranks)[step:]
            epoch, step = epoch + 1, 0


class RankRows:
    """What a `TrainInput` tells about its waits."""

    is_epoch_over = False

    def waited_s(self, step: int, since: float) -> float:
        return 0.0

    def callbacks(self, api: Any) -> list[Any]:
        return []


class Callback:
    """Stands for `keras.callbacks.Callback`."""

    model: Any = None

    def set_params(self, params: Any) -> None:
        self.params = params

    def set_model(self, model: Any) -> None:
        self.model = model

    def on_train_begin(self, logs: Any = None) -> None: ...

    def on_train_end(self, logs: Any = None) -> None: ...

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None: ...

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None: ...

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None: ...

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None: ...


class History(Callback):
    """Stands for `keras.callbacks.History`."""

    def __init__(self) -> None:
        self.epoch: list[int] = []
        self.history: dict[str, list[Any]] = {}

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epoch.append(epoch)
        for name, value in (logs or {}).items():
            self.history.setdefault(name, []).append(value)


class CallbackList:
    """Stands for `keras.callbacks.CallbackList`."""

    def __init__(
        self, callbacks: list[Any], add_history: bool, add_progbar: bool, model: Any = None, **params: Any
    ) -> None:
        self.callbacks, self.model, self.params = callbacks, model, params
        for callback in callbacks:
            callback.set_params(params)
            callback.set_model(model)

    def _each(self, hook: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*args)

    def on_train_begin(self, logs: Any = None) -> None:
        self._each("on_train_begin", logs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._each("on_epoch_begin", epoch, logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._each("on_epoch_end", epoch, logs)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._each("on_train_batch_begin", batch, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._each("on_train_batch_end", batch, logs)


_CALLBACKS = types.SimpleNamespace(Callback=Callback, CallbackList=CallbackList, History=History)


@dataclass(frozen=True)
class CountingKeras:
    """Stands for `raykeras.compat.keras_api.KerasAPI`."""

    name: str = "keras"
    version: str = "3"
    compiles_executions: bool = True

    @property
    def module(self) -> Any:
        return types.SimpleNamespace(callbacks=_CALLBACKS)

    def describe(self, model: Any) -> dict[str, Any]:
        return {}

    def learning_rate(self, model: Any) -> float:
        return 0.1

    def steps_per_execution(self, model: Any) -> int:
        return 1

    def direct_hooks(self, callbacks: Any, hook: str) -> None:
        return None


@dataclass
class _Variable:
    name: str
    value: int = 0
    shape: tuple[int, ...] = ()

    def numpy(self) -> Any:
        return np.array([self.value])


@dataclass
class CountingModel:
    """A model whose weight is a hash of the rows that it was trained on."""

    rank: int
    num_ranks: int
    plan: CountedRows
    collective: Collective
    weight: _Variable = field(default_factory=lambda: _Variable("weight"))
    total: float = 0.0
    count: int = 0
    step: int = 0
    stop_training: bool = False
    optimizer: Any = None

    def __post_init__(self) -> None:
        self.train_function = self._train_step

    @property
    def variables(self) -> list[_Variable]:
        return [self.weight]

    trainable_variables = variables

    def fit(self, batches: Iterator[list[int]], epochs: int, initial_epoch: int, callbacks: Any) -> None:
        """Train as Keras 3 does."""
        self.stop_training = False
        callbacks.on_train_begin()
        for epoch in range(initial_epoch, epochs):
            self.total, self.count = 0.0, 0
            callbacks.on_epoch_begin(epoch)
            logs: Any = None
            for step in range(self.plan.num_steps):
                callbacks.on_train_batch_begin(step)
                logs = self.train_function(batches)
                callbacks.on_train_batch_end(step, logs)
                if self.stop_training:
                    break
            callbacks.on_epoch_end(epoch, logs)
            if self.stop_training:
                break

    def _train_step(self, batches: Iterator[list[int]]) -> dict[str, float]:
        current = scheduler()
        current.sleep(current.random.uniform(0.1, 1.0) * self.plan.step_s)
        rows = self.collective.gather(self.step, self.rank, next(batches))
        self.step += 1
        self.weight.value = advance(self.weight.value, rows)
        self.total, self.count = self.total + loss(self.weight.value), self.count + 1
        return {"loss": self.total / self.count}


class UnavailableError(Exception):
    """Stands for `tensorflow.errors.UnavailableError`."""


UnavailableError.__module__ = "tensorflow.errors"


class Collective:
    """Gathers the rows of all ranks in each step; some workers notice that others are lost, and some hang."""

    def __init__(self, run: TrainRun, num_ranks: int, data: CountedRows) -> None:
        self._nodes = [process.node for process in run.processes]
        self._num_ranks, self._data = num_ranks, data
        self._rows: dict[int, dict[int, list[int]]] = {}
        self._waiters: list[Waiter] = []
        self._is_broken = False
        for process in run.processes:
            if not process.is_alive:
                self._notice_loss()
            process.at_exit.append(self._notice_loss)

    def gather(self, step: int, rank: int, rows: list[int]) -> list[int]:
        """Return the rows of a global batch in their order, once all ranks have called this."""
        current, by_rank = scheduler(), self._rows.setdefault(step, {})
        by_rank[rank] = rows
        if len(by_rank) == self._num_ranks:
            current.wake_all(self._waiters)
        while len(by_rank) < self._num_ranks or self._is_cut():
            if self._is_broken:
                raise UnavailableError("Connection reset by peer")
            current.wait(self._waiters, 0.5 if self._is_cut() else None)
        self._rows.pop(step - 2, None)
        iterators = [iter(by_rank[rank]) for rank in range(self._num_ranks)]
        positions = self._data.positions(step)
        return [next(iterators[position % _NUM_SHARDS % self._num_ranks]) for position in positions]

    def _is_cut(self) -> bool:
        """Return whether a node of the workers cannot be reached by the others."""
        is_spread = any(node is not self._nodes[0] for node in self._nodes)
        return is_spread and any(node.cut_until_s > scheduler().now for node in self._nodes)

    def _notice_loss(self) -> None:
        current = scheduler()
        if current.random.random() < 0.7:
            current.call_later(current.random.uniform(0.0, 1.0), self._break)

    def _break(self) -> None:
        self._is_broken = True
        scheduler().wake_all(self._waiters)


def run(job: TrainJob, context: WorkerContext, *, api: Any, build: Any) -> Outcome:
    """Run a job on a worker as `raykeras.worker.train.run` does."""
    process = scheduler().process
    collectives = process.globals["run"].collectives
    key = job.token, job.attempt
    if key not in collectives:
        collectives[key] = Collective(process.globals["run"], job.scale.workers, job.train)
    try:
        with context.callbacks as callbacks:
            model = CountingModel(context.rank, job.scale.workers, job.train, collectives[key])
            session = TrainingSession(job, context, api, model, callbacks, train=RankRows(), counts_steps=False)
            batches = job.train.batches(context.rank, job.scale.workers, job.first_step)
            model.step = job.first_step
            try:
                model.fit(batches, job.epochs, session.initial_epoch, session.callback_list())
            except TrainingPreempted:
                return session.preempted()
            return session.ended()
    except (RaykerasError, RayError):
        raise
    except Exception as error:
        raise user_code_error(error, context.rank) from error


_WEIGHTS, _ARRAYS = "model.keras", "state.npz"


@dataclass
class Snapshot:
    """A copy of the model's state."""

    state: dict[str, Any]
    files: dict[str, str]
    unserializable: str = ""

    def release(self) -> None:
        pass

    def write(self, folder: str) -> None:
        for name, text in self.files.items():
            Path(folder, name).write_text(text)
        store.write_state(folder, self.state)


def take_snapshot(
    model: CountingModel, api: Any, state: Mapping[str, Any], extra: Mapping[str, Any], *_: Any
) -> Snapshot:
    """Stands for `raykeras.checkpoint.snapshot.take_snapshot`."""
    arrays: dict[str, np.ndarray] = {}
    values = {name: to_json(value, arrays, name) for name, value in extra.items()}
    lists = {name: array.tolist() for name, array in arrays.items()}
    files = {_WEIGHTS: str(model.weight.value), _ARRAYS: json.dumps([[model.total, model.count], lists])}
    return Snapshot({**state, **values, "extra": list(values)}, files)


def restore(model: CountingModel, api: Any, checkpoint: Checkpoint) -> Restored:
    """Stands for `raykeras.checkpoint.snapshot.restore`."""
    state = checkpoint.state
    with checkpoint.local_file(_WEIGHTS) as path:
        model.weight.value = int(Path(path).read_text())
    with checkpoint.local_file(_ARRAYS) as path:
        metrics, lists = json.loads(Path(path).read_text())
    arrays = {name: np.array(values) for name, values in lists.items()}
    extra = {name: from_json(state[name], arrays) for name in state["extra"]}
    return Restored(checkpoint, state, extra, metrics)


def restore_metrics(model: CountingModel, api: Any, restored: Restored, rank: int) -> None:
    """Stands for `raykeras.checkpoint.snapshot.restore_metrics`."""
    model.total, model.count = restored.metrics
