"""Keras' own tests, which come with its wheel, plain and through raykeras.

    python -m tests.compat.keras_suite [--replicas N] [MODULE ...]

Prints, of the tests that pass plain, how many pass through raykeras on one replica and on two, and each other one with
its reason in `keras_suite.json`. Fails if one has no reason there, or one with a reason passes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
REASONS = Path(__file__).with_suffix(".json")
MODULES = (
    "trainers.trainer_test",
    "callbacks",
    "models.model_test",
    "models.functional_test",
    "metrics.confusion_metrics_test",
    "metrics.reduction_metrics_test",
    "optimizers",
    "layers.layer_test",
    "layers.normalization.batch_normalization_test",
    "layers.normalization.spectral_normalization_test",
    "layers.core",
    "layers.reshaping",
    "saving.saving_api_test",
    "utils.summary_utils_test",
    "distillation",
)
_TIMEOUT_S = 240


def run(modules: Sequence[str], folder: Path, options: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Run the tests; return the outcome of each, and the first line of what went wrong."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "tests.compat.redirect", "-p", "no:cacheprovider", "-q"]
    command += ["-c", os.devnull, f"--rootdir={folder}", f"--timeout={_TIMEOUT_S}", "--continue-on-collection-errors"]
    command += [f"--junitxml={report}", *options, "--pyargs", *(f"keras.src.{module}" for module in modules)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": "tensorflow"}
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        state, text = "passed", ""
        for kind in ("failure", "error", "skipped"):
            if (node := case.find(kind)) is not None:
                state, text = kind, (node.get("message") or "").strip().split("\n")[0]
        outcomes[f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"] = (state, text)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, action="append", help="by default 1 and 2")
    parser.add_argument("modules", nargs="*", default=MODULES, metavar="MODULE", help="of keras.src")
    arguments = parser.parse_args()
    reasons: dict[str, dict[str, str]] = json.loads(REASONS.read_text()) if REASONS.exists() else {}
    print("| replicas | pass plain | pass through raykeras | |\n| --- | --- | --- | --- |")
    wrong: list[str] = []
    for replicas in arguments.replicas or (1, 2):
        options, known = [f"--replicas={replicas}"], reasons.get(f"replicas-{replicas}", {})
        with tempfile.TemporaryDirectory() as folder:
            plain = run(arguments.modules, Path(folder), options)
        with tempfile.TemporaryDirectory() as folder:
            ours = run(arguments.modules, Path(folder), [*options, "--through-raykeras"])
        passing = [name for name, (state, _) in plain.items() if state == "passed"]
        failing = {name: ours.get(name, ("lost", ""))[1] for name in passing if ours.get(name, ("",))[0] != "passed"}
        share = 1 - len(failing) / max(1, len(passing))
        print(f"| {replicas} | {len(passing)} | {len(passing) - len(failing)} | {share:.1%} |", flush=True)
        for name, text in failing.items():
            print(f"- {name}: {known.get(name) or f'**no reason**: {text}'}")
        wrong += [f"{name} fails without a reason" for name in failing if name not in known]
        wrong += [f"{name} passes and has a reason" for name in known if name in passing and name not in failing]
    raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
