"""Scalars of a run for TensorBoard, written by the driver without TensorFlow.

The names of metrics are those of `keras.callbacks.TensorBoard`, so that their curves can be compared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from raykeras.core import events
from raykeras.core.events import Event
from raykeras.core.logs import scalars

if TYPE_CHECKING:
    from tensorboard.summary.writer.record_writer import RecordWriter

FOLDER = "tensorboard"


class TensorBoardLog:
    """An event handler that writes a value per epoch of each metric, the learning rate, the throughput and data wait.

    Args:
        folder: Local folder of the run. The files are in `tensorboard/train` and `tensorboard/validation` of it.
    """

    def __init__(self, folder: str) -> None:
        self._folder = os.path.join(folder, FOLDER)
        self._files: dict[str, IO[bytes]] = {}
        self._writers: dict[str, RecordWriter] = {}
        self._starts: dict[str, tuple[int, float]] = {}  # epoch and time, until they are written

    def __call__(self, event: Event) -> None:
        if isinstance(event, events.RunStarted | events.RunRestarted):
            first = event.initial_epoch if isinstance(event, events.RunStarted) else event.epoch or 0
            self._starts = dict.fromkeys(("train", "validation"), (first, event.time))
        elif isinstance(event, events.EpochEnded):
            self._write_epoch(event)
        elif isinstance(event, events.RunEnded):
            self._close()

    def _write_epoch(self, event: events.EpochEnded) -> None:
        values: dict[str, dict[str, Any]] = {"train": {}, "validation": {}}
        for name, value in event.logs.items():
            is_validation = name.startswith("val_")
            values["validation" if is_validation else "train"][f"epoch_{name.removeprefix('val_')}"] = value
        if event.learning_rate is not None:
            values["train"]["epoch_learning_rate"] = event.learning_rate
        values["train"] |= {"rows_per_second": event.rows_per_s, "data_wait": event.data_wait}
        for name in values:
            self._write_scalars(name, values[name], event)

    def _write_scalars(self, name: str, values: Mapping[str, Any], event: events.EpochEnded) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        by_tag = scalars(values)
        if not by_tag:
            return
        if name in self._starts:  # TensorBoard drops the values of later epochs, which are trained again
            epoch, time = self._starts.pop(name)
            self._write(name, session_log=SessionLog(status=SessionLog.START), step=epoch, wall_time=time)
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in by_tag.items()])
        self._write(name, summary=summary, step=event.epoch, wall_time=event.time)

    def _write(self, name: str, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record

        if name not in self._writers:
            self._open(name)
        self._writers[name].write(Record(**fields).SerializeToString())
        self._files[name].flush()

    def _open(self, name: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = os.path.join(self._folder, name)
        os.makedirs(folder, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names
        file = open(os.path.join(folder, f"events.out.tfevents.{time.time():017.6f}"), "ab")  # noqa: SIM115
        self._files[name], self._writers[name] = file, RecordWriter(file)
        self._writers[name].write(Record(file_version="brain.Event:2", wall_time=time.time()).SerializeToString())

    def _close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files, self._writers = {}, {}
