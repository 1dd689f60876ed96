"""The pictures of `docs/guides/reports.md`: reports of recorded runs, in Chromium.

    python -m tests.support.report_screenshots            # needs chromium and chromium-driver
    python -m tests.support.report_screenshots --record   # trains the runs again first; some minutes

`tests/support/reported_runs/` holds what the runs left: one on two workers that was killed twice and lost a worker, and
one on one worker.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import raykeras as rk
from raykeras.checkpoint.store import OWNER_FILE
from raykeras.report.page import write_report
from tests.support import interrupted_run
from tests.support.chromium import chromium

ROOT = Path(__file__).parents[2]
RUNS = Path(__file__).with_name("reported_runs")
IMAGES = ROOT / "docs" / "images"
EPOCHS = 14


def main() -> None:
    """Write the pictures."""
    if "--record" in sys.argv:
        record()
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        runs = shutil.copytree(RUNS, Path(folder, "runs"))
        one, two = Path(folder, "one.html"), Path(folder, "two.html")
        write_report([str(runs / "two-workers")], str(one))
        write_report([str(runs / "two-workers"), str(runs / "one-worker")], str(two))
        browser.open(one, width=1280)
        browser.screenshot(IMAGES / "report-wide-light.png", width=1280, height=1760)
        browser.open(two, width=390, dark=True)
        browser.screenshot(IMAGES / "report-narrow-dark.png", width=390, height=1800)


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
    main()
