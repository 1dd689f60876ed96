"""Whether the tests catch faults that are injected into raykeras, one at a time.

    python -m benchmarks.faults [NUMBER ...]

Each fault changes one place in a copy of the project, and the tests that should catch it run there. At least one of
them must fail; without a fault all of them must pass. `docs/design/tests.md` contains the table that this prints.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_COPIED = ("raykeras", "tests", "benchmarks", "pipelines", "pyproject.toml", "README.md")
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Fault:
    """A fault to inject.

    Attributes:
        name: Description of the fault.
        path: File to change, relative to `raykeras/`.
        old, new: The text to replace, which must occur exactly once, and its replacement.
        tests: Tests that should catch the fault.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


EXACTNESS, RESUME = "tests/integration/test_exactness.py", "tests/integration/test_resume.py"
FAULTS = (
    Fault(
        "a replica's share of the loss is wrong",
        "distribute/weighting.py",
        "return tf.math.multiply_no_nan(value, tf.cast(current.share, value.dtype))",
        "return value * tf.cast(0.5, value.dtype)",
        (f"{EXACTNESS}::test_training_matches_keras[1x2 keras 257 rows, weights]",),
    ),
    Fault(
        "a row is skipped on resume",
        "data/streaming/interleave.py",
        "            (rows,) = interleaver.interleave(*_rank_range(rank_input, plan, a, b))\n",
        "            (rows,) = interleaver.interleave(*_rank_range(rank_input, plan, a, b))\n"
        "            if a == first and first > 0:\n"
        "                rows[0] = rows[-1]\n",
        (f"{RESUME}::test_run_resumes_with_steps_per_execution_and_validation_freq[1-keras]",),
    ),
    Fault(
        "the metrics of an epoch are reset on resume",
        "worker/resume.py",
        "            self._training.restore_metrics()\n",
        "            pass\n",
        (f"{RESUME}::test_run_resumes_with_steps_per_execution_and_validation_freq[1-keras]",),
    ),
    Fault(
        "a checkpoint is committed before its last file",
        "checkpoint/store.py",
        "key=lambda file: file == STATE_FILE",
        "key=lambda file: file != STATE_FILE",
        ("tests/unit/checkpoint/test_checkpoint.py::test_interrupted_upload_leaves_no_checkpoint",),
    ),
    Fault(
        "the last short batch is dropped",
        "data/plan.py",
        "self.num_steps = -(-self.num_rows // global_batch_size)",
        "self.num_steps = max(1, self.num_rows // global_batch_size)",
        (
            "tests/unit/data/test_plan.py::test_order_is_pinned",
            "tests/integration/test_fit.py::test_arrays_match_keras",
        ),
    ),
    Fault(
        "the weights of the user's own batches are ignored",
        "data/adapters/adapter.py",
        "            arrays.append(array.astype(_numpy_dtype(tensor), copy=copy))\n",
        '            array = array * 0 + 1 if tensor.role == "sample_weight" else array\n'
        "            arrays.append(array.astype(_numpy_dtype(tensor), copy=copy))\n",
        ("tests/integration/test_batches.py::test_fit_with_validation_matches_keras[dataset-keras]",),
    ),
    Fault(
        "events arrive out of order",
        "core/events.py",
        "                self._pending.append(event)\n",
        "                self._pending.insert(0, event)\n",
        ("tests/unit/core/test_events.py::test_events_arrive_once_and_in_order",),
    ),
    Fault(
        "the state of callbacks is not restored",
        "worker/callback_placement.py",
        "            vars(callback)[name] = loads(data)\n",
        "            pass\n",
        ("tests/system/test_workers.py::test_compiled_model_and_callbacks_are_updated",),
    ),
    Fault(
        "validation rows are counted twice",
        "worker/train.py",
        "job.validation.open(context.rank, job.scale",
        "job.validation.open(0, job.scale",
        (f"{EXACTNESS}::test_training_on_two_workers_matches_keras[2x1 keras 257 rows, weights]",),
    ),
    Fault(
        "the seed is ignored",
        "data/plan.py",
        "np.random.SeedSequence([purpose, *key])",
        "np.random.SeedSequence([purpose, 0, *key[1:]])",
        ("tests/unit/data/test_plan.py::test_order_differs_by_epoch_and_seed",),
    ),
    Fault(
        "the batches of a Sequence arrive in another order",
        "data/adapters/epochs.py",
        "        return iter(order.tolist())\n",
        "        return iter(order[::-1].tolist())\n",
        ("tests/integration/test_batches.py::test_fit_with_validation_matches_keras[sequence-keras]",),
    ),
    Fault(
        "a damaged checkpoint is used",
        "checkpoint/store.py",
        "                checkpoint.verify()\n",
        "                pass\n",
        (
            "tests/unit/checkpoint/test_checkpoint.py::test_bit_flip_is_detected",
            "tests/integration/test_checkpoint.py::test_damaged_checkpoint_is_reported_and_skipped",
        ),
    ),
)


def copy_with(fault: Fault | None, folder: Path) -> None:
    """Copy the project, and inject a fault into the copy."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    if fault is not None:
        path = folder / "raykeras" / fault.path
        text = path.read_text()
        if text.count(fault.old) != 1:
            raise SystemExit(
                f"{fault.path} must contain the text of {fault.name!r} once; it occurs {text.count(fault.old)} times"
            )
        path.write_text(text.replace(fault.old, fault.new))


def failed_tests(folder: Path, tests: Sequence[str]) -> list[str]:
    """Run tests in a copy of the project; return those that failed."""
    command = [sys.executable, "-m", "pytest", "--instafail", "-q", "-p", "no:cacheprovider", "--durations=0", *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1) or bool(done.returncode) != bool(failed):
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return list(dict.fromkeys(failed))  # pytest prints each failure twice: at once, and in the summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", type=int, nargs="*", metavar="NUMBER", help="only these faults, from 1")
    numbers = parser.parse_args().numbers or range(1, len(FAULTS) + 1)
    faults = {number: FAULTS[number - 1] for number in numbers}
    with tempfile.TemporaryDirectory() as folder:
        copy_with(None, Path(folder))
        tests = sorted({test for fault in faults.values() for test in fault.tests})
        if failed := failed_tests(Path(folder), tests):
            raise SystemExit(f"fail without a fault: {failed}")
    print("| | fault | caught by |\n| --- | --- | --- |")
    missed = 0
    for number, fault in faults.items():
        with tempfile.TemporaryDirectory() as folder:
            copy_with(fault, Path(folder))
            failed = failed_tests(Path(folder), fault.tests)
        missed += not failed
        caught = ", ".join(f"`{test.removeprefix('tests/')}`" for test in failed)
        print(f"| {number} | {fault.name} | {caught or '**nothing**'} |", flush=True)
    raise SystemExit(f"{missed} faults are not caught" if missed else 0)


if __name__ == "__main__":
    main()
