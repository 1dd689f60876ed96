"""What surrounds Keras' `fit` on one worker.

Enters: a model, its orders, what ties the worker to the rest of the run. Leaves: the callbacks for `fit`, the state
from which it goes on, and, when it is over, the worker's `Outcome`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raykeras import callbacks as callbacks_
from raykeras import events
from raykeras.artifacts import Artifacts
from raykeras.batch_stream import BatchStream
from raykeras.checkpoint import Checkpoint
from raykeras.checks import check_signature, signature_of, variables_of
from raykeras.events import Event
from raykeras.keras_api import KerasAPI
from raykeras.logs import plain_logs, plain_number
from raykeras.orders import BatchOrders, DataOrders, Orders, Outcome
from raykeras.placement import go_on_writing, is_no_state
from raykeras.points import Points, beat_callback, point_callback
from raykeras.resumption import CallbackStates, resuming_list
from raykeras.saving import Keeper, Saver
from raykeras.snapshot import Restored, restore, restore_metrics, restore_weights
from raykeras.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Links:
    """What ties one worker to the rest of the run.

    Attributes:
        rank: This worker's.
        callbacks: Gives the user's callbacks that run here, by name.
        send: Takes events; None where nobody listens, which is on all ranks but the first.
        keeper: Writes checkpoints; None on all ranks but the first.
        points: What is done at which step.
        artifacts: The files that callbacks write here; None where they stay where they are.
        beat: Called whenever the training has come a step further.
        states: Pickles callbacks' attributes for the way back; None where they need no way back.
        return_variables: Whether the variables go back, too.
    """

    rank: int
    callbacks: contextlib.AbstractContextManager[Mapping[str, Any]]
    send: Callable[[Event], None] | None
    keeper: Keeper | None
    points: Points
    artifacts: Artifacts | None = None
    beat: Callable[[], None] | None = None
    states: Callable[[Sequence[Any]], list[dict[str, bytes]]] | None = None
    return_variables: bool = False


class Training:
    """What surrounds Keras' `fit`: what it goes on from, the callbacks, and what comes of it."""

    def __init__(
        self,
        orders: Orders,
        links: Links,
        api: KerasAPI,
        model: Any,
        callbacks: Mapping[str, Any],
        train: Stream | BatchStream,
        train_data: DataOrders | BatchOrders,
        first_step: int,
        counts: bool,
    ) -> None:
        self._counts = counts
        self._orders, self._links, self._api, self._model = orders, links, api, model
        self._callbacks, self._train, self._first_step = callbacks, train, first_step
        self._send = links.send or _discard
        self._batch_rows = _batch_rows(train_data)
        kind = api.module.callbacks.History
        theirs = [callback for callback in callbacks.values() if isinstance(callback, kind)]
        self._history = theirs[0] if theirs else kind()
        self._is_ours = not theirs
        self._states = CallbackStates({**callbacks, "History": self._history}, is_no_state)
        self._params = {"epochs": orders.epochs, "steps": orders.num_steps, "verbose": 0}
        signature = signature_of(model, api)
        self._saver = Saver(orders, model, api, links.keeper, signature, self._extra)
        self._restored = self._restore(signature)

    @property
    def initial_epoch(self) -> int:
        epoch, step = self._orders.begins_at
        stopped = self._restored is not None and self._restored.state["stopped"]
        return max(epoch, self._orders.epochs) if stopped and not step else epoch

    def _restore(self, signature: Mapping[str, Any]) -> Restored | None:
        resumption = self._orders.resumption
        if resumption is None:
            return None
        taken = Checkpoint(resumption.checkpoint)
        if resumption.weights_only:
            restore_weights(self._model, self._api, taken)
            return None
        ours = {**signature, "variables": variables_of(self._model)}
        check_signature(taken, taken.state["signature"], ours)
        restored = restore(self._model, self._api, taken)
        self._saver.begin_at(resumption.epoch, resumption.step, self._first_step)
        go_on_writing(self._callbacks.values() if self._links.rank == 0 else (), resumption.epoch)
        return restored

    def _extra(self) -> dict[str, Any]:
        return {"callbacks": self._states.changed()}

    def _put_back(self) -> None:
        if self._restored is not None:
            self._states.put_back(self._restored.extra["callbacks"])

    def _put_metrics_back(self) -> None:
        assert self._restored is not None
        restore_metrics(self._model, self._api, self._restored, self._links.rank)

    def callback_list(self) -> Any:
        """All callbacks: the user's, and ours, which follow them."""
        orders, links, api = self._orders, self._links, self._api
        epoch, step = orders.begins_at
        told = {"rank": links.rank, "epoch": epoch, "step": step}
        if orders.attempt:
            workers = orders.scale.workers
            self._send(events.RunRestarted(**told, workers=workers, attempt=orders.attempt))
        else:
            self._send(
                events.RunStarted(
                    rank=links.rank,
                    params={**self._params, **orders.train.params},
                    workers=orders.scale.workers,
                    replicas=orders.scale.num_replicas,
                    initial_epoch=epoch,
                    initial_step=step,
                    path=orders.folder.path,
                )
            )
        tell = callbacks_.event_callback(
            api,
            self._send,
            rank=links.rank,
            batch_rows=self._batch_rows,
            waited_s=self._train.waited_s,
            position=(epoch, step),
            first_step=self._first_step,
        )
        ours = [tell]
        if self._is_ours:
            ours.insert(0, self._history)
        if isinstance(self._train, BatchStream):
            ours.insert(0, self._train.ending_callback(api))
        if links.artifacts is not None:
            ours.append(callbacks_.epoch_end_callback(api, lambda epoch, logs: self._tell_artifacts(epoch)))
        ours.append(point_callback(api, links.points, self._saver, self._first_step, (epoch, step)))
        if links.beat is not None:
            ours.append(beat_callback(api, links.beat))
        state = self._restored.state if self._restored is not None else {}
        return resuming_list(
            api,
            [*self._callbacks.values(), *ours],
            self._model,
            params=self._params,
            steps_of=self._steps_of,
            epoch=epoch,
            step=step,
            counts=self._counts,
            is_over=bool(step) and bool(state["stopped"]),
            put_back=self._put_back,
            put_metrics_back=self._put_metrics_back,
            logs={name: np.asarray(value) for name, value in state.get("step_logs", {}).items()},
        )

    def _steps_of(self, epoch: int) -> int | None:
        first, step = self._orders.begins_at
        if epoch == first and isinstance(self._train, BatchStream) and self._train.is_epoch_over:
            return step
        return self._orders.steps_of(epoch)

    def left(self) -> Outcome:
        """What a training gives that is to go on later."""
        self._close_keeper()
        return self._outcome(left=True)

    def ended(self) -> Outcome:
        """What a training gives that came to its end."""
        epochs = self._history.epoch
        last_epoch = epochs[-1] if epochs else self._orders.epochs - 1
        last_logs = {name: values[-1] for name, values in self._history.history.items() if values}
        self._saver.save_last(last_epoch, plain_logs(last_logs), stopped=bool(epochs))
        self._close_keeper()
        self._tell_artifacts(last_epoch)
        return self._outcome(left=False)

    def _close_keeper(self) -> None:
        if self._links.keeper is not None:
            self._links.keeper.close()

    def _outcome(self, left: bool) -> Outcome:
        links = self._links
        # all ranks read them: some are variables that are put together when read
        variables = [np.asarray(v) for v in self._api.variables(self._model)] if links.return_variables else None
        mine = list(self._callbacks.values())
        return Outcome(
            history={name: [plain_number(v) for v in values] for name, values in self._history.history.items()},
            epoch=list(self._history.epoch),
            params=self._params,
            callback_states=links.states(mine) if links.states is not None and links.rank == 0 else [],
            variables=variables if links.rank == 0 else None,
            left=left,
        )

    def _tell_artifacts(self, epoch: int) -> None:
        for path in self._links.artifacts.collect() if self._links.artifacts is not None else ():
            self._send(events.ArtifactSaved(rank=self._links.rank, epoch=epoch, path=path))


def _batch_rows(data: DataOrders | BatchOrders) -> Callable[[int], int]:
    """Step to the rows of its global batch; 0 where only the user knows them."""
    if isinstance(data, BatchOrders):
        return lambda step: 0
    plan = data.plan(0)
    return lambda step: plan.batch_num_rows(step % plan.num_steps)


def _discard(event: Event) -> None:
    """Only the chief tells."""
