"""Tests with the oldest and the newest supported versions of other packages, each set in an environment of its own.

    python -m tests.compat.versions [SET ...]

Prints the table of `docs/reference/versions.md`, and the end of the output of what fails. The environments are kept
in `build/versions`, and made again if their pins or `pyproject.toml` change. Needs nothing but Python 3.11 and pip.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "versions"

SETS = {
    "oldest": (
        "ray==2.52.0",
        "tensorflow==2.19.0",
        "tf_keras==2.19.0",
        "keras==3.12.0",
        "pyarrow==18.0.0",
        "numpy==1.26.4",
        "fsspec==2024.6.0",
    ),
    "middle": (
        "ray==2.55.1",
        "tensorflow==2.20.0",
        "tf_keras==2.20.1",
        "keras==3.13.2",
        "pyarrow==22.0.0",
        "numpy==2.2.6",
        "fsspec==2025.9.0",
    ),
    "newest": (
        "ray==2.60.0",
        "tensorflow==2.21.0",
        "tf_keras==2.21.0",
        "keras==3.15.1",
        "pyarrow==26.0.1",
        "numpy==2.4.6",
        "fsspec==2026.9.0",
    ),
}
"""Pins by set. The first one is the lower ends of the ranges in `pyproject.toml`, the last one `constraints.txt`."""

EXACTNESS = "tests/integration/test_exactness.py"
CHECKS = {
    "private names": ("tests/compat",),
    "exact on 1 × 2": (EXACTNESS, "-k", "1x2"),
    "exact on 2 × 1": (EXACTNESS, "-k", "2x1"),
    "streamed fit": ("tests/integration/test_fit.py::test_stream_over_several_executions_matches_keras",),
    "failed workers": (
        "tests/system/test_workers.py::test_user_exception_has_rank",
        "tests/system/test_killed.py::test_killed_workers_are_restarted",
    ),
}
"""Arguments of pytest by column of the table."""

_NUM_LINES = 40  # of the output of what fails


def make_environment(name: str) -> Path:
    """Make the environment of a set, unless it is there; return its Python."""
    folder = FOLDER / name
    python, constraints, made_with = folder / "bin" / "python", folder / "pins.txt", folder / "made_with.txt"
    pins = "\n".join(SETS[name]) + "\n"
    wanted = pins + (ROOT / "pyproject.toml").read_text()
    if made_with.exists() and made_with.read_text() == wanted:
        return python
    venv.create(folder, clear=True, with_pip=True)
    constraints.write_text(pins)
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
    if not run([*install, "--editable", ".[test]"], folder / "install.log"):
        raise SystemExit(f"{name}: the packages cannot be installed; see {folder / 'install.log'}")
    made_with.write_text(wanted)
    return python


def run(command: Sequence[str], log: Path) -> bool:
    """Run a command with its output in a file; return whether it succeeds. Print the end of the output if not."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output).returncode
    if code:
        print(" ".join(command), *log.read_text().splitlines()[-_NUM_LINES:], sep="\n", flush=True)
    return code == 0


def check(name: str) -> list[str]:
    """Run the checks of a set; return the cells of its row."""
    python, started = make_environment(name), time.monotonic()
    cells = [name, ", ".join(pin.replace("==", " ") for pin in SETS[name])]
    for column, tests in CHECKS.items():
        log = FOLDER / name / f"{re.sub(r'[^a-z0-9]+', '_', column)}.log"
        passed = run([str(python), "-m", "pytest", "-p", "no:cacheprovider", *tests], log)
        count = re.search(r"(\d+) passed", log.read_text())
        cells.append(f"{count[1] if count else 0} passed" if passed else "**failed**")
    return [*cells, f"{time.monotonic() - started:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=["oldest", "newest"], metavar="SET", help=", ".join(SETS))
    sets = parser.parse_args().sets
    rows = [check(name) for name in sets]
    print(f"Python {platform.python_version()}\n")
    print(f"| set | versions | {' | '.join(CHECKS)} | seconds |\n|{' --- |' * (len(CHECKS) + 3)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    raise SystemExit(any("**failed**" in row for row in rows))


if __name__ == "__main__":
    main()
