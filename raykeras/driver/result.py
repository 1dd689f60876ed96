"""The result of `fit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raykeras.checkpoint.model_io import load_weights_into
from raykeras.checkpoint.store import Checkpoint, RunFolder, is_better
from raykeras.core.errors import CheckpointError
from raykeras.core.html import line
from raykeras.data.sources.base import join_names
from raykeras.driver.goodput import Timeline, summary
from raykeras.driver.notebook import epochs_tables
from raykeras.driver.stored_events import StoredEvents


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        history: A dict from each metric's name to its values at successive epochs, as `History.history` in Keras. A
            value is a float, or an array for a metric that has several values.
        epoch: Indices of the trained epochs, from 0.
        params: As `History.params` in Keras.
        path: Folder of the run.
        live_model: The trained model, if it is in this process.
        build: The function that builds the model, if `fit` was called with one.
    """

    history: dict[str, list[Any]]
    epoch: list[int]
    params: Mapping[str, Any]
    path: str
    live_model: Any = field(default=None, repr=False)
    build: Callable[[], Any] | None = field(default=None, repr=False)

    def model(self, **options: Any) -> Any:
        """Return the trained model, compiled, with its optimizer.

        A model that was trained in this process is returned as it is, except for tf_keras on several replicas.
        Otherwise, the function passed to `fit` builds a model, which receives the weights of the newest checkpoint;
        custom classes therefore need no registration. Without such a function, or with `options`, the model is loaded
        from the newest checkpoint.

        Args:
            **options: Arguments for `keras.models.load_model`, such as `custom_objects`. Ignored if the model is in
                this process.

        Returns:
            A Keras 3 or tf_keras model.

        Raises:
            CheckpointError: If the model must be loaded and the checkpoint holds only its weights.
        """
        if self.live_model is not None:
            return self.live_model
        newest = self.checkpoints[-1]
        if self.build is not None and not options:
            return load_weights_into(self.build, newest.path)()
        return newest.load_model(**options)

    @property
    def goodput(self) -> dict[str, float]:
        """Where the time of the run went, in seconds, over all calls of `fit`.

        The keys are "start", "build", "steps", "data_wait", "validation", "checkpoints", "lost", "restart" and "other".
        The values add up to the time from the start to the end of these calls.
        """
        timeline = Timeline()
        for event in StoredEvents(RunFolder(self.path)).read_new():
            timeline(event)
        return timeline.seconds()

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints of the run, oldest first."""
        return RunFolder(self.path).checkpoints()

    def best_checkpoint(self, monitor: str = "val_loss") -> Checkpoint:
        """Return the checkpoint with the best value of a metric.

        Args:
            monitor: Name of the metric. Higher is better for accuracy, AUC, precision, recall and F1; lower is better
                for others.

        Returns:
            The best one of the checkpoints that were kept.

        Raises:
            CheckpointError: If no checkpoint has this metric.
        """
        best: tuple[float, Checkpoint] | None = None
        names: set[str] = set()
        for checkpoint in self.checkpoints:
            logs = checkpoint.state["logs"]
            names |= set(logs)
            value = logs.get(monitor)
            if isinstance(value, int | float) and (best is None or is_better(monitor, value, best[0])):
                best = (value, checkpoint)
        if best is None:
            raise CheckpointError(
                f"`monitor` must be a metric of the checkpoints; got {monitor!r}. Metrics: {join_names(sorted(names))}."
            )
        return best[1]

    def _repr_html_(self) -> str:
        complete = {name: values for name, values in self.history.items() if len(values) == len(self.epoch)}
        logs = [{name: values[i] for name, values in complete.items()} for i in range(len(self.epoch))]
        shown = [line(self.path)]
        if self.epoch:
            shown.append(epochs_tables(self.epoch, logs, None))
        return "".join([*shown, line(summary(self.goodput))])
