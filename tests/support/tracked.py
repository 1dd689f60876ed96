"""What experiment trackers stored in the current folder, read back."""

from __future__ import annotations

import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Stored = dict[str, list[tuple[int, float]]]
"""Epochs and values of each metric, in the order of epochs; an epoch that is stored twice is there twice."""


def in_mlflow() -> Stored:
    """Return what the only run of MLflow stored, apart from what its callback stores in `on_test_end` without epoch."""
    import mlflow

    [run] = mlflow.search_runs(output_format="list")
    assert run.info.status == "FINISHED"
    [rate] = [value for name, value in run.data.params.items() if re.fullmatch("opt(imizer)?_learning_rate", name)]
    assert float(rate) == np.float32(0.01)
    client = mlflow.MlflowClient()
    names = [name for name in run.data.metrics if not name.startswith("validation_")]
    points = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return {name: sorted((point.step, point.value) for point in of_name) for name, of_name in points.items()}


def in_wandb() -> Stored:
    """Return what W&B stored for the only run, in a file for each time it was opened."""
    import wandb

    wandb.teardown()  # completes the files
    files = sorted(Path("wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1  # run-ID.wandb
    stored = defaultdict(list)
    for values in (values for file in files for values in _wandb_history(file.read_bytes())):
        for name in values.keys() - {"epoch/epoch"}:
            if name.startswith("epoch/"):
                stored[name.removeprefix("epoch/")].append((values["epoch/epoch"], values[name]))
    return stored


def in_comet(names: Collection[str], num_steps: int) -> Stored:
    """Return the metrics of these names that Comet's only archive holds, each at the last step of its epoch.

    Args:
        names: Names of metrics.
        num_steps: Steps of an epoch.
    """
    [file] = Path("comet").glob("*.zip")
    with zipfile.ZipFile(file) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").splitlines()]
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    stored = defaultdict(list)
    for metric in metrics:
        if (name := metric["metricName"]) in names:
            assert metric["step"] == (metric["epoch"] + 1) * num_steps
            stored[name].append((metric["epoch"], metric["metricValue"]))
    return stored


def in_tensorboard(folder: Path) -> Stored:
    """Return the scalars that Keras' TensorBoard callback wrote for each epoch."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    stored = {}
    for part, prefix in (("train", ""), ("validation", "val_")):
        events = EventAccumulator(str(folder / part))
        events.Reload()
        for tag in events.Tags()["tensors"]:
            if tag.startswith("epoch_"):
                points = [(event.step, float(make_ndarray(event.tensor_proto))) for event in events.Tensors(tag)]
                stored[prefix + tag.removeprefix("epoch_")] = points
    return stored


def _wandb_history(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the values of each `wandb.log` in a file: protobuf records, in blocks as in the log of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    position, part = 7, b""
    while position < len(data):
        if (left := 32768 - position % 32768) < 7:  # the end of a block is padded
            position += left
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        part += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            items = Record.FromString(part).history.item
            yield {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            part = b""
