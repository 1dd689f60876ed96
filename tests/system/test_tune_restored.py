"""A Ray Tune experiment that is restored after its driver and its trial were killed ends like an undisturbed one."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import raykeras as rk
from tests.support.compare import assert_same_weights
from tests.support.markdown import ROOT
from tests.support.resuming import X, Y, build
from tests.support.tuned import OPTIONS

METRICS = ("loss", "accuracy", "val_loss", "val_accuracy")


@pytest.mark.exhaustive
@pytest.mark.usefixtures("tensorflow")
def test_killed_experiment_is_restored(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.tuned", str(tmp_path)]
    codes = [subprocess.run(command, cwd=ROOT, capture_output=True).returncode for _ in range(2)]
    assert codes == [-signal.SIGKILL, 0]

    undisturbed = rk.fit(build, X, Y, run=rk.Run(storage=str(tmp_path / "undisturbed")), **OPTIONS)
    with open(tmp_path / "reported.csv", newline="") as file:
        reported = list(csv.DictReader(file))
    assert [int(row["training_iteration"]) for row in reported] == [epoch + 1 for epoch in undisturbed.epoch]
    for name in METRICS:
        assert [float(row[name]) for row in reported] == pytest.approx(undisturbed.history[name], rel=1e-6)

    (info,) = rk.runs(str(tmp_path / "runs"))
    events = [json.loads(line) for line in (Path(info.path) / "events.jsonl").read_text().splitlines()]
    starts = [(e["initial_epoch"], e["initial_step"]) for e in events if e["event"] == "RunStarted"]
    assert starts == [(0, 0), (2, 2)]
    assert_same_weights(rk.open_run(info.path).model(), undisturbed.model())
