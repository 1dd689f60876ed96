"""Warnings about a run that its events give rise to."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from raykeras.core import events
from raykeras.core.config import Run
from raykeras.core.events import Event
from raykeras.data.sources.base import did_you_mean, join_names


def unserializable_warner() -> Callable[[Event], None]:
    """Return an event handler that warns at the first checkpoint that lacks the model's architecture."""
    is_warned = False

    def handle(event: Event) -> None:
        nonlocal is_warned
        if isinstance(event, events.CheckpointSaved) and event.unserializable and not is_warned:
            is_warned = True
            warnings.warn(
                f"Keras cannot serialise the model ({event.unserializable}). Its checkpoints hold the weights and the "
                "optimizer, but no architecture. Load them into a model that your code builds.",
                stacklevel=1,
            )

    return handle


def missing_monitor_warner(monitor: str) -> Callable[[Event], None]:
    """Return an event handler that warns after the first epoch if its logs lack `monitor`, unless it is the default."""
    is_checked = monitor == Run.monitor

    def handle(event: Event) -> None:
        nonlocal is_checked
        if not is_checked and isinstance(event, events.EpochEnded):
            is_checked = True
            if monitor not in event.logs:
                warnings.warn(
                    f"`Run.monitor` must be a metric of the run; got {monitor!r}.{did_you_mean(monitor, event.logs)} "
                    f"Metrics: {join_names(event.logs)}. No checkpoint is kept as the best one.",
                    stacklevel=1,
                )

    return handle
