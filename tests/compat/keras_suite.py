"""Keras' own tests of `fit`, `evaluate` and `predict`, plain and through raykeras.

    python -m tests.compat.keras_suite [--scale NAME] [--tf-keras CHECKOUT] [MODULE ...]

Keras 3's tests are in its wheel; those of tf_keras need a checkout of the installed version. Prints how many of the
tests that pass in plain Keras pass through raykeras, and lists the others with their reasons from `keras_suite.json`.
On several workers, it counts separately the tests whose call is refused before training with one of the errors listed
there. Fails if a failing test has no reason, if a passing test has one, or if too few of the others pass.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
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
TF_KERAS_FILES = ("tf_keras/engine/training_test.py", "tf_keras/callbacks_test.py")
_TIMEOUT_S = 600  # 2,600 eager steps on two replicas take 80 ms each, in a MirroredStrategy without raykeras 70 ms


@dataclass(frozen=True)
class Scale:
    """The replicas or workers that tests run on, and the fraction of tests that must pass."""

    name: str
    options: tuple[str, ...]
    least: float


SCALES = (
    Scale("1 replica", ("--replicas=1",), 0.97),
    Scale("2 replicas", ("--replicas=2",), 0.95),
    Scale("2 workers", ("--workers=2", "--sample=60"), 0.8),
)


def run(tests: Sequence[str], folder: Path, options: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Run tests in a folder; return the outcome of each and the first line of its error."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "tests.compat.redirect", "-p", "no:cacheprovider", "-q"]
    command += ["-c", os.devnull, f"--rootdir={folder}", f"--timeout={_TIMEOUT_S}", "--continue-on-collection-errors"]
    command += [f"--junitxml={report}", *options, *tests]
    modules = {str(Path(test).parent) for test in tests if test.endswith(".py")}  # workers import them too
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *modules]), "KERAS_BACKEND": "tensorflow"}
    output = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True).stdout
    if not report.exists():
        raise SystemExit(output)
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        state, text = "passed", ""
        for kind in ("failure", "error", "skipped"):
            if (node := case.find(kind)) is not None:
                state, text = kind, (node.get("message") or "").strip().split("\n")[0]
        outcomes[f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"] = (state, text)
    return outcomes


def compare(package: str, tests: Sequence[str], scale: Scale, options: Sequence[str]) -> list[str]:
    """Print how many tests pass and why others fail; return the problems."""
    title, reasons = f"{package}, {scale.name}", json.loads(REASONS.read_text())
    sometimes = reasons.get(f"{title}, sometimes", {})
    known = {**reasons.get(package, {}), **reasons.get(title, {})}  # by prefix of the test's name
    options = [*options, *scale.options]
    with tempfile.TemporaryDirectory() as folder:
        plain = run(tests, Path(folder), options)
    with tempfile.TemporaryDirectory() as folder:
        ours = run(tests, Path(folder), [*options, "--through-raykeras"])
    passing = [name for name, (state, _) in plain.items() if state == "passed"]
    failing = {name: ours.get(name, ("", "lost"))[1] for name in passing if ours.get(name, ("",))[0] != "passed"}
    refused = {}
    for error, reason in reasons.get(f"refused on {scale.name}", {}).items():
        if names := [name for name, text in failing.items() if error in text]:
            refused[reason] = names
            failing = {name: text for name, text in failing.items() if name not in names}
    tried = len(passing) - sum(map(len, refused.values()))
    share = 1 - len(failing) / max(1, tried)
    print(f"{title}: {tried - len(failing)} of {tried} pass, {share:.1%}", flush=True)
    for reason, names in refused.items():
        print(f"- refused before training, {len(names)} more: {reason}", flush=True)
    wrong = []
    for name, text in failing.items():
        reason = next((why for start, why in {**known, **sometimes}.items() if name.startswith(start)), None)
        print(f"- {name}: {reason or f'NO REASON: {text}'}", flush=True)
        wrong += [] if reason else [f"{title}: {name} fails without a reason"]
    is_sample = any(option.startswith("--sample") for option in scale.options)
    for start in reasons.get(title, {}) if is_sample else known:  # a sample may lack the failing ones of a group
        if any(name.startswith(start) for name in passing) and not any(name.startswith(start) for name in failing):
            wrong.append(f"{title}: {start} passes, but has a reason")
    return wrong + ([f"{title}: fewer than {scale.least:.0%} pass"] if share < scale.least else [])


def tf_keras_tests(checkout: Path, folder: Path) -> list[str]:
    """Copy tf_keras' tests to a folder, importing from `tf_keras.src` as in the wheel; return their paths."""
    version = importlib.metadata.version("tf_keras")
    command = ["git", "-C", str(checkout), "show"]
    paths = []
    for name in TF_KERAS_FILES:
        text = subprocess.run([*command, f"v{version}:{name}"], check=True, capture_output=True, text=True).stdout
        path = folder / Path(name).name
        text = re.sub(r"^from tf_keras\b", "from tf_keras.src", text, flags=re.MULTILINE)
        path.write_text(re.sub(r"\bkeras\.utils\.(\w+_utils)\b", r"keras.src.utils.\1", text))
        paths.append(str(path))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", action="append", choices=[scale.name for scale in SCALES], help="by default all")
    parser.add_argument("--tf-keras", type=Path, metavar="CHECKOUT", help="git checkout with its version's tag")
    parser.add_argument("modules", nargs="*", default=MODULES, metavar="MODULE", help="module of keras.src")
    arguments = parser.parse_args()
    wrong: list[str] = []
    for scale in SCALES:
        if arguments.scale and scale.name not in arguments.scale:
            continue
        modules = [f"keras.src.{module}" for module in arguments.modules]
        wrong += compare("Keras", ["--pyargs", *modules], scale, [])
        if arguments.tf_keras is not None:
            with tempfile.TemporaryDirectory() as folder:
                wrong += compare("tf_keras", tf_keras_tests(arguments.tf_keras, Path(folder)), scale, ["--legacy"])
    raise SystemExit("\n".join(wrong) or None)  # an empty string would count as a failure


if __name__ == "__main__":
    main()
