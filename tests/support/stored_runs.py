"""Folders of runs as `fit` leaves them, written without training."""

from __future__ import annotations

import json
from pathlib import Path

from raykeras.checkpoint.store import OWNER_FILE
from raykeras.core import events
from raykeras.core.events import Event

HOSTILE = '</script><img src=x onerror="window.injected = 1"><b>%{x}<a href="https://example.com">'
"""A name that is HTML, closes a script, and is a link where Plotly interprets it."""

_STEPS, _STEP_S = 40, 0.05


def store_run(folder: Path, *, text: str = "accuracy", loss: float = 1.0, workers: int = 2) -> Path:
    """Write a run of two epochs, in the second of which a worker is lost, and return its folder.

    Args:
        folder: The folder to make.
        text: Name of a metric, and other texts of the run.
        loss: Training loss of the first epoch.
        workers: Number of workers.
    """
    folder.mkdir(parents=True)
    (folder / OWNER_FILE).write_text("")
    lines = [json.dumps(event.as_dict()) for event in _log(text, loss, workers)]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    arguments = {
        "epochs": 2,
        "class_weight": {text: 1.0},
        "scale": {"workers": workers},
        "run": {"monitor": "val_loss"},
    }
    record = {
        "calls": [{"command": ["fit.py", text], "arguments": arguments, "versions": {"raykeras": text}}],
        "model": {"class": text, "summary": text, "optimizer": {"class": "Adam", "learning_rate": 0.001}},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def _log(text: str, loss: float, workers: int) -> list[Event]:
    log: list[Event] = []
    now = 1.8e9

    def add(kind: type[Event], later_s: float = 0.0, /, **fields: object) -> None:
        nonlocal now
        now += later_s
        log.append(kind(time=now, **fields))

    def add_steps(epoch: int, first: int, last: int) -> None:
        for step in range(first, last + 1, 5):
            logs = {"loss": loss / (1 + epoch + step / _STEPS), text: 0.5}
            add(events.BatchEnded, 5 * _STEP_S, rank=0, epoch=epoch, step=step, num_steps=5, logs=logs, wait_s=0.02)

    add(events.PhaseStarted, phase="metadata")
    add(events.PhaseStarted, 0.5, phase="workers")
    add(events.PhaseStarted, 2.0, rank=0, phase="build")
    params = {"epochs": 2, "steps": _STEPS, "batch_size": 32}
    add(events.RunStarted, 1.0, params=params, workers=workers, replicas=workers, initial_epoch=0, path="")
    add(events.PhaseStarted, rank=0, phase="compile")
    for epoch in range(2):
        add(events.EpochStarted, rank=0, epoch=epoch, step=0)
        if epoch == 0:
            add(events.PhaseStarted, 1.0, rank=0, epoch=0, step=1, phase="train")
        add_steps(epoch, 5, _STEPS)
        if epoch == 1:
            add(events.WorkerFailed, 0.5, rank=1, node=text, cause=f"It was killed. {text}", next="")
            add(events.PhaseStarted, 0.1, phase="workers")
            add(events.RunRestarted, 2.0, rank=0, epoch=1, step=0, workers=workers, attempt=1)
            add(events.PhaseStarted, 1.0, rank=0, epoch=1, step=1, phase="train")
            add_steps(epoch, 5, _STEPS)
        for rank in range(workers):
            seconds = _STEPS * _STEP_S
            add(events.WorkerStepsEnded, rank=rank, epoch=epoch, num_steps=_STEPS, seconds=seconds, wait_s=0.1 * rank)
        logs = {"loss": loss / (1 + epoch), text: 0.5, "val_loss": 1.1 / (1 + epoch), f"val_{text}": 0.4}
        validation = {"loss": logs["val_loss"], text: 0.4}
        add(events.ValidationEnded, 0.3, rank=0, epoch=epoch, step=_STEPS, logs=validation, seconds=0.3)
        add(events.EpochEnded, 0.1, rank=0, epoch=epoch, step=_STEPS, logs=logs, seconds=2.4, learning_rate=0.001)
        add(events.CheckpointSaved, 0.1, rank=0, epoch=epoch, step=_STEPS, path=text, seconds=0.05, resumed=now)
    add(events.RunEnded, 0.2, status="completed", logs={"loss": 0.5})
    return log
