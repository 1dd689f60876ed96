"""Report the epochs of a run to Ray Tune."""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any

from raykeras.checkpoint.store import Checkpoint, RunFolder
from raykeras.core import events
from raykeras.core.errors import OptionError
from raykeras.core.events import Event
from raykeras.core.logs import Logs
from raykeras.core.tracebacks import without_frames
from raykeras.driver.callback import DriverCallback
from raykeras.driver.runs import StoredRun


class TuneReportCallback(DriverCallback):
    """Reports each epoch to Ray Tune, with the metrics and the checkpoint of the epoch.

    Create it in the function of a trial, and pass it in the `callbacks` of `fit`. Training waits at the end of each
    epoch for Tune's decision. When Tune stops or pauses the trial, all workers stop after this epoch, and the run is
    interrupted. `training_iteration` is the number of epochs.

    To let a trial that is restored continue its run, name the run after the trial, in storage that all nodes can
    reach: `raykeras.Run(storage=..., name=ray.tune.get_context().get_trial_id())`. Every epoch is reported once.

    Raises:
        OptionError: Outside of a trial, or if the trial continues from a checkpoint of another trial.
    """

    @without_frames
    def __init__(self) -> None:
        self._num_reported = _num_reported_epochs()
        self._saved: events.CheckpointSaved | None = None
        self._path = ""
        _wait_for_end_of_function()

    def on_event(self, event: Event) -> None:
        """Keep the newest checkpoint, and report what is left when the run has ended.

        Args:
            event: The event.
        """
        if isinstance(event, events.RunStarted):
            self._path = event.path
        elif isinstance(event, events.CheckpointSaved):
            self._saved = event
        elif isinstance(event, events.RunEnded) and event.status == "completed":
            self._report_earlier(None)

    def should_stop(self, epoch: int, logs: Logs) -> bool:
        """Report an epoch.

        Args:
            epoch: Index of the epoch, from 0.
            logs: Metrics of the epoch.

        Returns:
            False.

        Raises:
            SystemExit: If Tune stops or pauses the trial.
        """
        self._report_earlier(epoch)
        is_saved = self._saved is not None and (self._saved.epoch, self._saved.step) == (epoch, 0)
        self._report(epoch, logs, _as_tune_checkpoint(self._saved.path) if self._saved and is_saved else None)
        return False

    def _report_earlier(self, epoch: int | None) -> None:
        """Report the epochs before one that were finished before the trial was interrupted; None for all of them."""
        if epoch is not None and self._num_reported >= epoch:
            return
        run = StoredRun(self._path)
        run.update()
        for number, ended in sorted(run.state.finished.items()):
            if epoch is None or number < epoch:
                self._report(number, ended.logs, None)

    def _report(self, epoch: int, logs: Logs, checkpoint: Any) -> None:
        from ray import tune

        if epoch >= self._num_reported:
            self._num_reported = epoch + 1
            tune.report(dict(logs), checkpoint=checkpoint)


def _num_reported_epochs() -> int:
    """Return how many epochs the current trial has reported up to the checkpoint from which it is restored."""
    from ray import tune

    context = tune.get_context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray warns outside of a trial
        trial_id = context.get_trial_id()
    if trial_id is None:
        raise OptionError(
            "A `TuneReportCallback` must be created in the function of a Ray Tune trial; got a call outside of one. "
            "Create it where the trial calls `fit`."
        )
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return 0
    own, trial = os.path.basename(context.get_trial_dir()), os.path.basename(os.path.dirname(checkpoint.path))
    if own != trial:
        raise OptionError(
            f"A trial must continue its own run; got a checkpoint of trial {trial!r} in {own!r}. Schedulers that copy "
            "checkpoints between trials, such as PopulationBasedTraining, are not supported: use one that only stops "
            "or pauses trials, such as ASHAScheduler."
        )
    with checkpoint.as_directory() as folder:
        return int(Checkpoint(folder).state["epoch"])


def _wait_for_end_of_function() -> None:
    """Let Ray Tune wait, when it stops the current trial, until the trial's function has returned.

    Tune joins the thread of the function with a timeout of 0, and ends the process. It still does so after
    `TUNE_FORCE_TRIAL_CLEANUP_S`.
    """
    thread = threading.current_thread()
    join = thread.join
    thread.join = lambda timeout=None: join()  # type: ignore[method-assign]


def _as_tune_checkpoint(path: str) -> Any:
    """Return the checkpoint in a folder as one of Ray Tune, which copies it to the storage of the experiment."""
    from ray import tune

    if RunFolder(path).is_local:
        return tune.Checkpoint(path)
    import fsspec
    import pyarrow.fs

    fs, inside = fsspec.core.url_to_fs(path)
    return tune.Checkpoint(inside, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)))
