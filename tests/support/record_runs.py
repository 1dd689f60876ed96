"""The recorded runs that the pictures of reports show.

    python -m tests.support.record_runs   # trains them again; some minutes

`tests/support/reported_runs/` holds what the runs left: one on two workers that was killed twice and lost a worker, and
one on one worker.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import raykeras as rk
from raykeras.checkpoint.store import OWNER_FILE
from tests.support import interrupted_run

ROOT = Path(__file__).parents[2]
RUNS = Path(__file__).with_name("reported_runs")
EPOCHS = 14


def record() -> None:
    """Train the runs, and keep what a report reads."""
    with tempfile.TemporaryDirectory() as folder:
        path, _ = interrupted_run.make(Path(folder), EPOCHS)
        keep(path, "two-workers")
        columns = {"x": "image", "y": "label"}
        train = rk.parquet(f"{interrupted_run.DATA}/train", sample_weight="weight", cache=None, **columns)
        test = rk.parquet(f"{interrupted_run.DATA}/test", **columns)
        run = rk.Run(storage=folder, name="one-worker", checkpoint_every=20)
        result = rk.fit(
            interrupted_run.build,
            train,
            validation_data=test,
            batch_size=64,
            epochs=EPOCHS,
            callbacks=interrupted_run.callbacks(),
            verbose=0,
            run=run,
        )
        keep(Path(result.path), "one-worker")


def keep(path: Path, name: str) -> None:
    """Copy the events and `run.json` of a run, with paths as in a user's clone."""
    (RUNS / name).mkdir(parents=True, exist_ok=True)
    for file in ("events.jsonl", "run.json"):
        text = (path / file).read_text().replace(str(ROOT), "/home/user/raykeras").replace(str(path.parent), "runs")
        (RUNS / name / file).write_text(text)
    shutil.copy(path / OWNER_FILE, RUNS / name)


if __name__ == "__main__":
    record()
