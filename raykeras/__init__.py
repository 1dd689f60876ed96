"""raykeras: `model.fit`, on a Ray cluster, fed from Parquet and NumPy.

Importing it imports neither Ray nor TensorFlow: every name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raykeras.callbacks import DriverCallback
    from raykeras.checkpoint import Checkpoint
    from raykeras.driver import fit
    from raykeras.errors import (
        CheckpointError,
        ColumnError,
        ModelError,
        OptionError,
        RaykerasError,
        ResourceError,
        SourceError,
        UserCodeError,
        ValidationError,
        WorkerLostError,
    )
    from raykeras.events import (
        ArtifactSaved,
        BatchEnded,
        CheckpointSaved,
        EpochEnded,
        EpochStarted,
        Event,
        RunEnded,
        RunStarted,
        ValidationEnded,
        WorkerFailed,
    )
    from raykeras.inference import evaluate, predict
    from raykeras.options import Run, Scale
    from raykeras.pipeline import Pipeline
    from raykeras.placement import on_chief
    from raykeras.result import Result
    from raykeras.sources import Source
    from raykeras.sources.arrays import npy
    from raykeras.sources.dataset import dataset
    from raykeras.sources.parquet import parquet

__version__ = "0.1.0"

__all__ = [
    "ArtifactSaved",
    "BatchEnded",
    "Checkpoint",
    "CheckpointError",
    "CheckpointSaved",
    "ColumnError",
    "DriverCallback",
    "EpochEnded",
    "EpochStarted",
    "Event",
    "ModelError",
    "OptionError",
    "Pipeline",
    "RaykerasError",
    "ResourceError",
    "Result",
    "Run",
    "RunEnded",
    "RunStarted",
    "Scale",
    "Source",
    "SourceError",
    "UserCodeError",
    "ValidationEnded",
    "ValidationError",
    "WorkerFailed",
    "WorkerLostError",
    "dataset",
    "evaluate",
    "fit",
    "npy",
    "on_chief",
    "parquet",
    "predict",
]

_MODULES = {
    "callbacks": ("DriverCallback",),
    "checkpoint": ("Checkpoint",),
    "driver": ("fit",),
    "inference": ("evaluate", "predict"),
    "options": ("Run", "Scale"),
    "pipeline": ("Pipeline",),
    "placement": ("on_chief",),
    "result": ("Result",),
    "sources": ("Source",),
    "sources.arrays": ("npy",),
    "sources.dataset": ("dataset",),
    "sources.parquet": ("parquet",),
    "events": (
        "ArtifactSaved",
        "BatchEnded",
        "CheckpointSaved",
        "EpochEnded",
        "EpochStarted",
        "Event",
        "RunEnded",
        "RunStarted",
        "ValidationEnded",
        "WorkerFailed",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'raykeras' has no attribute {name!r}")
    return getattr(importlib.import_module(f"raykeras.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
