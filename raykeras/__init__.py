"""Keras' `model.fit` on a Ray cluster, fed from Parquet, NumPy or Ray datasets.

Names are loaded on first use, so that importing the package imports neither Ray nor TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raykeras.checkpoint.store import Checkpoint
    from raykeras.cli.pipeline import Pipeline
    from raykeras.core.config import Run, Scale
    from raykeras.core.errors import (
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
    from raykeras.core.events import (
        ArtifactSaved,
        BatchEnded,
        CheckpointDamaged,
        CheckpointSaved,
        EpochEnded,
        EpochStarted,
        Event,
        PhaseStarted,
        RunEnded,
        RunRestarted,
        RunStarted,
        StorageFailed,
        ValidationEnded,
        WorkerFailed,
        WorkerStepsEnded,
        WorldResized,
    )
    from raykeras.data.sources.arrays import npy
    from raykeras.data.sources.base import Source
    from raykeras.data.sources.parquet import parquet
    from raykeras.data.sources.ray_dataset import dataset
    from raykeras.driver.callback import DriverCallback
    from raykeras.driver.evaluate import evaluate
    from raykeras.driver.fit import fit
    from raykeras.driver.predict import predict
    from raykeras.driver.ray_tune import TuneReportCallback
    from raykeras.driver.result import Result
    from raykeras.driver.runs import RunInfo, open_run, runs
    from raykeras.worker.callback_placement import on_chief

__version__ = "0.1.0"

__all__ = [
    "ArtifactSaved",
    "BatchEnded",
    "Checkpoint",
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointSaved",
    "ColumnError",
    "DriverCallback",
    "EpochEnded",
    "EpochStarted",
    "Event",
    "ModelError",
    "OptionError",
    "PhaseStarted",
    "Pipeline",
    "RaykerasError",
    "ResourceError",
    "Result",
    "Run",
    "RunEnded",
    "RunInfo",
    "RunRestarted",
    "RunStarted",
    "Scale",
    "Source",
    "SourceError",
    "StorageFailed",
    "TuneReportCallback",
    "UserCodeError",
    "ValidationEnded",
    "ValidationError",
    "WorkerFailed",
    "WorkerLostError",
    "WorkerStepsEnded",
    "WorldResized",
    "dataset",
    "evaluate",
    "fit",
    "npy",
    "on_chief",
    "open_run",
    "parquet",
    "predict",
    "runs",
]

_MODULES = {
    "checkpoint.store": ("Checkpoint",),
    "cli.pipeline": ("Pipeline",),
    "core.config": ("Run", "Scale"),
    "core.errors": (
        "CheckpointError",
        "ColumnError",
        "ModelError",
        "OptionError",
        "RaykerasError",
        "ResourceError",
        "SourceError",
        "UserCodeError",
        "ValidationError",
        "WorkerLostError",
    ),
    "core.events": (
        "ArtifactSaved",
        "BatchEnded",
        "CheckpointDamaged",
        "CheckpointSaved",
        "EpochEnded",
        "EpochStarted",
        "Event",
        "PhaseStarted",
        "RunEnded",
        "RunRestarted",
        "RunStarted",
        "StorageFailed",
        "ValidationEnded",
        "WorkerFailed",
        "WorkerStepsEnded",
        "WorldResized",
    ),
    "data.sources.arrays": ("npy",),
    "data.sources.base": ("Source",),
    "data.sources.parquet": ("parquet",),
    "data.sources.ray_dataset": ("dataset",),
    "driver.callback": ("DriverCallback",),
    "driver.evaluate": ("evaluate",),
    "driver.fit": ("fit",),
    "driver.predict": ("predict",),
    "driver.ray_tune": ("TuneReportCallback",),
    "driver.result": ("Result",),
    "driver.runs": ("RunInfo", "open_run", "runs"),
    "worker.callback_placement": ("on_chief",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'raykeras' has no attribute {name!r}")
    return getattr(importlib.import_module(f"raykeras.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
