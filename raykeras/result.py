"""What `fit` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from raykeras.checkpoint import Checkpoint, RunFolder, is_better
from raykeras.errors import CheckpointError
from raykeras.sources import listed
from raykeras.transfer import weights_into


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        history: Metric to its values, one for each epoch, as Keras' `History.history`:
            floats, and arrays of a metric with several.
        epoch: The epochs that were trained, from 0.
        params: As Keras' `History.params`.
        path: The run's folder.
    """

    history: dict[str, list[Any]]
    epoch: list[int]
    params: Mapping[str, Any]
    path: str
    live_model: Any = field(default=None, repr=False)
    build: Callable[[], Any] | None = field(default=None, repr=False)

    def model(self, **options: Any) -> Any:
        """The trained model, compiled, its optimizer included.

        It is the one that was trained in this process, unless it is one of tf_keras on several replicas; or
        what the function that built it builds, with the newest checkpoint's weights, so that classes of
        one's own need no registration; or the newest checkpoint's.

        Args:
            **options: For `keras.models.load_model`, such as `custom_objects`, if it has to be loaded.
        """
        if self.live_model is not None:
            return self.live_model
        newest = self.checkpoints[-1]
        if self.build is not None and not options:
            return weights_into(self.build, newest.path)()
        return newest.load_model(**options)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that were kept, oldest first."""
        return RunFolder(self.path).checkpoints()

    def best_checkpoint(self, monitor: str = "val_loss") -> Checkpoint:
        """Of the checkpoints that were kept, the one with the best value of a metric.

        Args:
            monitor: Name of the metric. Accuracies and the like are best when high, others when low.

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
                f"`monitor` must be a metric of the checkpoints; got {monitor!r}. Theirs: {listed(sorted(names))}."
            )
        return best[1]
